package xds

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// The examples in docs/xds.md are what Translate writes.
func TestDocumentedExamples(t *testing.T) {
	pay := allow(t, "charge-cards", "spiffe://shop.example/orders", "spiffe://shop.example/payments", 8080)
	pay.Ref, pay.Reason = policy.RuleRef{Policy: "charge-cards", File: "payments.yaml", Line: 14}, "charging belongs to orders"
	pay.From = append(pay.From, pattern(t, "spiffe://shop.example/billing/*"))
	guard := allow(t, "no-dev", "spiffe://shop.example/dev/**", "spiffe://shop.example/payments")
	guard.Ref, guard.Effect = policy.RuleRef{Policy: "no-dev", File: "guardrails.yaml", Line: 9}, policy.Deny
	s := service("/payments", "7f3a")
	res, err := Translate(View{Node: s.ID, Ports: s.Ports, Rules: policy.NewRuleset([]policy.Rule{pay, guard}), Services: []Service{s}})
	require.NoError(t, err)
	var want []proto.Message
	for _, typeURL := range []string{ListenerType, ExtensionType, ClusterType, EndpointType} {
		for _, r := range res.Types[typeURL] {
			m := newMessage(typeURL)
			require.NoError(t, proto.Unmarshal(r.Resource.Value, m))
			want = append(want, m)
		}
	}
	doc, err := os.ReadFile("../../docs/xds.md")
	require.NoError(t, err)
	blocks := strings.Split(string(doc), "```json\n")[1:]
	require.Len(t, blocks, len(want))
	for i, b := range blocks {
		text, _, _ := strings.Cut(b, "```")
		got := want[i].ProtoReflect().New().Interface()
		require.NoError(t, protojson.Unmarshal([]byte(text), got))
		if !proto.Equal(got, want[i]) {
			t.Errorf("example %d: want\n%s", i+1, protojson.MarshalOptions{Multiline: true, Indent: "  "}.Format(want[i]))
		}
	}
}
