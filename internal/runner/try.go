package runner

import (
	"fmt"
	"io"
	"strings"
	"text/template"
)

// tryData resolves what spec.try may refer to.
type tryData struct {
	mesh *mesh
	cli  string // how to call sallyport for this mesh, ready to paste
}

// funcs are the placeholders of spec.try: {{addr "orders" "http"}} is where an
// app listens, {{admin "orders"}} and {{tunnel "orders"}} where its sidecar
// does, {{metrics}} the control plane's metrics, {{policies}} the watched
// folder, {{sallyport}} the command line up to the verb. The last two are quoted
// for a shell where they have to be.
func (d tryData) funcs() template.FuncMap {
	return template.FuncMap{
		"addr": func(name, port string) (string, error) {
			w, err := d.mesh.workload(name)
			if err != nil {
				return "", err
			}
			for _, ports := range []map[string]address{w.serve, w.local} {
				if a, ok := ports[port]; ok {
					return a.String(), nil
				}
			}
			return "", fmt.Errorf("workload %s has no port %q under serve or local", name, port)
		},
		"admin": func(name string) (string, error) {
			w, err := d.mesh.workload(name)
			return w.admin.String(), err
		},
		"tunnel": func(name string) (string, error) {
			w, err := d.mesh.workload(name)
			return w.tunnel.String(), err
		},
		"metrics":   func() string { return d.mesh.control.metrics.String() },
		"policies":  func() string { return shellWord(relative(d.mesh.policies)) },
		"sallyport": func() string { return d.cli },
	}
}

// render fills in spec.try.
func (d tryData) render(w io.Writer) error {
	t, err := template.New("spec.try").Funcs(d.funcs()).Parse(d.mesh.try.value)
	if err != nil {
		return err
	}
	return t.Execute(w, nil)
}

// checkTry refuses a text that would fail only once everything runs.
func (r *reader) checkTry(m *mesh) {
	if len(r.errs) > 0 {
		return // a missing workload would be reported twice
	}
	if err := (tryData{mesh: m}).render(io.Discard); err != nil {
		r.failf(m.try, "spec.try: %s", strings.TrimPrefix(err.Error(), "template: "))
	}
}

// workload finds a workload by its name.
func (m *mesh) workload(name string) (workload, error) {
	for _, w := range m.loads {
		if w.name.value == name {
			return w, nil
		}
	}
	return workload{}, fmt.Errorf("no workload %q", name)
}
