package xds

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// levelField is where a node says, below metadataKey of its metadata, what it
// understands of the policy language.
const levelField = "level"

func levelMetadata(l policy.Level) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{
		metadataKey: structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{levelField: structpb.NewNumberValue(float64(l))}}),
	}}
}

// levelOf is the lowest one where a node says nothing, or nothing that makes sense.
func levelOf(n *corev3.Node) policy.Level {
	f := n.GetMetadata().GetFields()[metadataKey].GetStructValue().GetFields()[levelField].GetNumberValue()
	if l := policy.Level(f); float64(l) == f && l >= policy.LevelPorts {
		return min(l, policy.LevelRequests)
	}
	return policy.LevelPorts
}
