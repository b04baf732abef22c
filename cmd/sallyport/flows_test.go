package main

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	sallyportv1 "github.com/sallyport-mesh/sallyport/api/sallyport/v1"
	"github.com/sallyport-mesh/sallyport/internal/flow"
)

// answered is what a control plane has sent.
type answered struct {
	grpc.ClientStream
	flows [][]byte
}

func (a *answered) Recv() (*sallyportv1.FlowsResponse, error) {
	if len(a.flows) == 0 {
		return nil, io.EOF
	}
	data := a.flows[0]
	a.flows = a.flows[1:]
	return &sallyportv1.FlowsResponse{Flow: data}, nil
}

func TestFlowsAreSortedByStart(t *testing.T) {
	var sent [][]byte
	for _, id := range []string{"3", "1", "2"} { // in the order of arrival
		f := flow.Flow{ID: id, Start: time.Unix(int64(id[0]), 0), Side: flow.Outbound, Outcome: flow.Failed}
		data, err := f.MarshalJSON()
		require.NoError(t, err)
		sent = append(sent, data)
	}
	for _, c := range []struct {
		output string
		follow bool
		want   string
	}{{"text", false, "123"}, {"text", true, "312"}, {"json", false, "312"}} {
		var out strings.Builder
		require.NoError(t, (&cli{stdout: &out, stderr: io.Discard, output: c.output}).printFlows(&answered{flows: sent}, c.follow))
		got := ""
		for line := range strings.Lines(out.String()) {
			_, after, _ := strings.Cut(strings.ReplaceAll(line, `"id":"`, "id "), "id ")
			got += after[:1]
			if !strings.Contains(strings.ToLower(line), "none") {
				t.Errorf("a failed connection shows as %s", line)
			}
		}
		if got != c.want {
			t.Errorf("%s, follow %v: got %s, want %s", c.output, c.follow, got, c.want)
		}
	}
}

func TestFlowsObeyNoRecord(t *testing.T) {
	for _, output := range []string{"text", "json"} {
		var out strings.Builder
		_ = (&cli{stdout: &out, stderr: io.Discard, output: output}).printFlows(&answered{flows: [][]byte{
			[]byte(`{"id":"1","error":"` + "\u009b" + `2J"}`),
			[]byte(`{"id":"1","error":"\u001b[2J"}`),
		}}, true) // whether it refuses them or not
		if strings.ContainsAny(out.String(), "\x1b\u009b") {
			t.Errorf("%s: %q", output, out.String())
		}
	}
}
