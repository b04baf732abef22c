//go:build e2e

// Package e2e runs the real binaries and breaks things around them.
package e2e

import "fmt"

// pairFiles are the policy files of most tests here: client may call server's
// two ports, stranger may not.
func pairFiles() map[string]string {
	return map[string]string{
		"workloads.yaml": workload("client", "") + workload("stranger", "") +
			workload("server", "  ports:\n    - {name: http, port: 8080, protocol: http}\n    - {name: echo, port: 7000, protocol: tcp}\n"),
		"allow.yaml": allowClient("client"),
	}
}

func workload(name, ports string) string {
	return fmt.Sprintf("apiVersion: sallyport.dev/v1\nkind: Workload\nmetadata: {name: %s}\nspec:\n  attest: [{kind: join-token}]\n%s---\n", name, ports)
}

func allowClient(from string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1
kind: Policy
metadata: {name: server-callers}
spec:
  to: {workload: server}
  allow:
    - from: [{workload: %s}]
      ports: [http, echo]
`, from)
}
