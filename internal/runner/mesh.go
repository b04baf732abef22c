package runner

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v4"

	"github.com/sallyport-mesh/sallyport/internal/configfile"
)

// maxMeshFile bounds mesh.yaml, in bytes.
const maxMeshFile = 1 << 20

// mesh is mesh.yaml, checked. Every address already carries the port offset.
type mesh struct {
	file     string // path of mesh.yaml, for error messages
	dir      string
	td       spiffeid.TrustDomain
	policies string // absolute
	control  controlPlane
	logLevel string
	loads    []workload
	try      text
}

// controlPlane is where the control plane listens.
type controlPlane struct {
	listen, metrics address
	svidTTL         time.Duration
}

// workload is one app with its sidecar.
type workload struct {
	name     text
	command  []text
	env      []string           // NAME=value, sorted
	serve    map[string]address // :: declared port name → where the app listens
	local    map[string]address // :: name → a port of the app outside the mesh
	upstream []upstream         // in the order of the file
	tunnel   address
	admin    address
}

// upstream is an explicit outbound listener of a sidecar.
type upstream struct {
	listen address
	to     text // REF:PORT
	ref    spiffeid.ID
	port   string // name or number
}

// address is a loopback TCP address and the key of mesh.yaml that set it.
type address struct {
	netip.AddrPort
	key string
	at  text
}

// text is a scalar of mesh.yaml that remembers where it stands.
type text struct {
	value     string
	line, col int
}

// UnmarshalYAML takes any scalar as it is written.
func (t *text) UnmarshalYAML(n *yaml.Node) error {
	t.line, t.col = n.Line, n.Column
	if n.Kind != yaml.ScalarNode {
		return errors.New("want a single value")
	}
	t.value = n.Value
	return nil
}

// meshFile is the form of mesh.yaml; unknown keys are errors.
type meshFile struct {
	APIVersion text `yaml:"apiVersion"`
	Kind       text `yaml:"kind"`
	Spec       struct {
		TrustDomain  text `yaml:"trustDomain"`
		Policies     text `yaml:"policies"`
		ControlPlane struct {
			Listen  text `yaml:"listen"`
			Metrics text `yaml:"metrics"`
			SVIDTTL text `yaml:"svidTTL"`
		} `yaml:"controlPlane"`
		LogLevel  text           `yaml:"logLevel"`
		Workloads []workloadFile `yaml:"workloads"`
		Try       text           `yaml:"try"`
	} `yaml:"spec"`
}

type workloadFile struct {
	Name     text            `yaml:"name"`
	Command  []text          `yaml:"command"`
	Env      map[string]text `yaml:"env"`
	Serve    map[string]text `yaml:"serve"`
	Local    map[string]text `yaml:"local"`
	Tunnel   text            `yaml:"tunnel"`
	Admin    text            `yaml:"admin"`
	Outbound []struct {
		Listen text `yaml:"listen"`
		To     text `yaml:"to"`
	} `yaml:"outbound"`
}

// load reads and checks DIR/mesh.yaml and adds offset to each of its ports.
func load(dir string, offset int) (*mesh, error) {
	file := filepath.Join(dir, "mesh.yaml")
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("reading the mesh: %w; `sallyport up` takes the folder that holds mesh.yaml", err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxMeshFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	if len(content) > maxMeshFile {
		return nil, fmt.Errorf("reading %s: larger than %d bytes", file, maxMeshFile)
	}
	return parse(file, content, offset)
}

// parse is load without the disk.
func parse(file string, content []byte, offset int) (*mesh, error) {
	r := &reader{file: file, offset: offset}
	var in meshFile
	if err := yaml.Load(bytes.TrimPrefix(content, []byte("\ufeff")), &in, yaml.WithKnownFields()); err != nil {
		return nil, withLines(file, content, r.yamlError(err))
	}
	m := r.mesh(in)
	if len(r.errs) > 0 {
		return nil, withLines(file, content, errors.Join(r.errs...))
	}
	return m, nil
}

// withLines shows the line and a caret below each error of a joined err that
// begins with FILE:LINE:COL.
func withLines(file string, content []byte, err error) error {
	var out []error
	for msg := range strings.SplitSeq(err.Error(), "\n") {
		var line, col int
		if at, ok := strings.CutPrefix(msg, file+":"); ok {
			fmt.Sscanf(at, "%d:%d:", &line, &col) // 0 where there is none, and then there is no snippet
		}
		if s := configfile.Snippet(bytes.TrimPrefix(content, []byte("\ufeff")), line, col); s != "" {
			msg += "\n    " + strings.ReplaceAll(s, "\n", "\n    ")
		}
		out = append(out, errors.New(msg))
	}
	return errors.Join(out...)
}
