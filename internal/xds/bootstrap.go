package xds

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-mesh/sallyport/internal/agent/pemfile"
)

const (
	// BootstrapFile is the name of the bootstrap file in a folder of PEM files.
	BootstrapFile = "grpc-bootstrap.json"
	// refreshPEM is how often gRPC looks for newer files.
	refreshPEM = "10s"
)

// AddBootstrap has w also write the file that GRPC_XDS_BOOTSTRAP names (gRFC A27,
// A29, A65): the control plane, reached by mutual TLS at HOST:PORT, and the same
// SVID for calls, as [CertificateProvider].
func AddBootstrap(w *pemfile.Writer, controlPlane string) error {
	dir, err := filepath.Abs(w.Dir())
	if err != nil {
		return fmt.Errorf("finding the folder of %s: %w", BootstrapFile, err)
	}
	w.Add(BootstrapFile, func(svid *x509svid.SVID) ([]byte, error) {
		return bootstrap(controlPlane, dir, svid.Certificates[0].Subject.SerialNumber)
	})
	return nil
}

// bootstrap names the instance as the certificate does.
func bootstrap(controlPlane, dir, instance string) ([]byte, error) {
	type object = map[string]any
	files := object{
		"certificate_file":    filepath.Join(dir, pemfile.FileChain),
		"private_key_file":    filepath.Join(dir, pemfile.FileKey),
		"ca_certificate_file": filepath.Join(dir, pemfile.FileBundle),
		"refresh_interval":    refreshPEM,
	}
	out, err := json.MarshalIndent(object{
		"xds_servers": []object{{
			"server_uri":      controlPlane,
			"channel_creds":   []object{{"type": "tls", "config": files}},
			"server_features": []string{"xds_v3"},
		}},
		"node":                                   object{"id": instance},
		"certificate_providers":                  object{CertificateProvider: object{"plugin_name": "file_watcher", "config": files}},
		"server_listener_resource_name_template": ServerListeners + "%s",
	}, "", "  ")
	return append(out, '\n'), err
}
