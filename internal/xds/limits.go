package xds

import (
	"fmt"
	"strings"
	"unicode"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Limits of the protocol. Those that an operator may want to move are in
// [ServerConfig].
const (
	maxInstance = 64       // bytes of node.id
	maxMeshName = 253      // bytes of Service.MeshName
	maxName     = 2048 + 8 // bytes of a resource name: a SPIFFE ID, with room
	maxRequest  = 2 << 20  // bytes of one request
	maxMessage  = 64 << 20 // bytes of one response that a client takes
	maxResource = 30 << 20 // bytes of one rules resource: both fit into one response
	splitAt     = 2 << 20  // bytes after which a response is closed and the rest follows

	maxNameBytes = 1 << 20 // bytes of all names that one stream makes the server remember
	maxSiblings  = 3       // streams of one instance
	maxProxyless = 100     // the same, of gRPC without sidecar

	requestRate  = 100 // requests per second and stream, in the long run
	requestBurst = 50  // requests at once
)

// checkRequest refuses what no sidecar sends.
func checkRequest(r *discoveryv3.DeltaDiscoveryRequest) error {
	if n := proto.Size(r); n > maxRequest {
		return status.Errorf(codes.ResourceExhausted, "a request of %d bytes; at most %d are read", n, maxRequest)
	}
	for _, list := range [][]string{r.GetResourceNamesSubscribe(), r.GetResourceNamesUnsubscribe()} {
		for _, name := range list {
			if err := checkName(name); err != nil {
				return err
			}
		}
	}
	for name, version := range r.GetInitialResourceVersions() {
		if err := checkName(name); err != nil {
			return err
		}
		if len(version) > maxInstance {
			return status.Errorf(codes.InvalidArgument, "a version of %d bytes", len(version))
		}
	}
	return nil
}

func checkName(name string) error {
	if name == "" || len(name) > maxName {
		return status.Errorf(codes.InvalidArgument, "a resource name of %d bytes", len(name))
	}
	return nil
}

// checkInstance accepts an instance and refuses an identity: who the node is,
// its certificate says.
func checkInstance(id string) error {
	if strings.HasPrefix(id, "spiffe://") {
		return status.Errorf(codes.PermissionDenied, "node.id %.100q claims an identity; it names the instance only", id)
	}
	if err := validInstance(id); err != nil {
		return status.Error(codes.InvalidArgument, "node.id: "+err.Error())
	}
	return nil
}

func validInstance(id string) error {
	bad := func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-')
	}
	if id == "" || len(id) > maxInstance || strings.ContainsFunc(id, bad) {
		return fmt.Errorf("instance %.100q: want 1 to %d of a-z, A-Z, 0-9, dot, underscore, hyphen", id, maxInstance)
	}
	return nil
}

// shortType names a type for people, as in "Cluster".
func shortType(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }

// clip makes text from outside fit for a log line and a terminal: valid UTF-8,
// printable, n bytes at most.
func clip(s string, n int) string {
	s = strings.ToValidUTF8(s[:min(len(s), n)], "?")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}
