package runner

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"

	"github.com/sallyport-mesh/sallyport/pkg/policy"
)

// checkPolicies reads the policy folder as the control plane will and compares
// mesh.yaml with it, so that mistakes show before anything starts.
func checkPolicies(m *mesh) error {
	if st, err := os.Stat(m.policies); err != nil || !st.IsDir() {
		return fmt.Errorf("%s: spec.policies: %s is not a folder that can be read; it is looked for beside mesh.yaml", m.file, relative(m.policies))
	}
	sets, err := policy.ParseTree(os.DirFS(m.policies))
	if err != nil {
		return fmt.Errorf("reading the policies in %s: %w", relative(m.policies), err)
	}
	rules, err := policy.Compile(m.td, sets)
	if err != nil {
		return fmt.Errorf("reading the policies in %s: %w", relative(m.policies), err)
	}
	if report := policy.RunTests(rules, sets); report.Failed() {
		return fmt.Errorf("testing the policies in %s:\n%s", relative(m.policies), report)
	}
	if proof := policy.Prove(rules, sets); proof.Failed() {
		return fmt.Errorf("proving the invariants in %s:\n%s", relative(m.policies), proof)
	}
	for _, w := range m.loads {
		if err := m.checkWorkload(rules, w); err != nil {
			return err
		}
	}
	return nil
}

// checkWorkload finds names in mesh.yaml that no policy file declares.
func (m *mesh) checkWorkload(rules *policy.Ruleset, w workload) error {
	declared, ok := rules.WorkloadByName(w.name.value)
	if !ok {
		return fmt.Errorf("%s: no Workload %s in %s", position(m.file, w.name), w.name.value, relative(m.policies))
	}
	for _, port := range slices.Sorted(maps.Keys(w.serve)) {
		if _, ok := declared.PortByName(port); !ok {
			return fmt.Errorf("%s: Workload %s (%s) declares no port %s", position(m.file, w.serve[port].at), w.name.value, where(declared), port)
		}
	}
	for _, u := range w.upstream {
		target, ok := rules.Workload(u.ref)
		if !ok {
			return fmt.Errorf("%s: no Workload has the ID %s", position(m.file, u.to), u.ref)
		}
		if !declares(target, u.port) {
			return fmt.Errorf("%s: Workload %s (%s) declares no port %s", position(m.file, u.to), target.Name, where(target), u.port)
		}
	}
	return nil
}

// declares reports whether w has a port of this name or number.
func declares(w policy.CompiledWorkload, port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		_, ok := w.PortByName(port)
		return ok
	}
	_, ok := w.Port(uint16(n))
	return ok
}

func where(w policy.CompiledWorkload) string { return fmt.Sprintf("%s:%d", w.File, w.Line) }
