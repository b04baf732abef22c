package arch

// row is a set of rooms. A room imports only from rows above its own, that is
// from lower numbers.
type row struct {
	number int
	rooms  []string // package paths below the module; "x/..." includes what is below
	why    string
}

var rows = []row{
	{0, []string{"pkg/identity", "internal/store", "internal/relay", "internal/tunnel", "internal/peercred", "internal/socket", "internal/configfile", "internal/completion", "api/..."},
		"names, bytes and storage: each stands alone, so each can be read and tested alone"},
	{1, []string{"pkg/policy", "internal/issuer/attest", "internal/issuer/ca", "internal/audit", "internal/capture", "internal/federation", "internal/revocation", "internal/agent/endpoint", "internal/agent/pemfile", "internal/store/etcd", "internal/store/storetest"},
		"single ideas on top of names and storage; none knows another"},
	{2, []string{"internal/agent", "internal/issuer/registry", "internal/issuer/external", "internal/issuer/external/issuertest", "internal/catalog", "internal/xds", "internal/flow"},
		"the two planes begin here and do not know each other"},
	{3, []string{"internal/issuer", "internal/proxy", "internal/insight", "internal/admin"},
		"services made of the rows before"},
	{4, []string{"internal/controlplane", "internal/sidecar", "internal/host", "internal/runner"},
		"compositions: one control plane, one sidecar, one host's agent, one local mesh"},
	{5, []string{"cmd/...", "internal/meshtest"},
		"wiring; nothing imports it"},
	{6, []string{"test/...", "bench/...", "examples/...", "deploy", "internal/arch"},
		"looks at the whole from outside"},
}

// ban keeps something away from some rooms.
type ban struct {
	rooms  []string // as in row
	never  []string // import paths as in row; the module's own begin with "./"
	direct bool     // only direct imports count, because a dependency may need it for itself
	why    string
}

var bans = []ban{
	{[]string{"cmd/proxy", "internal/sidecar", "internal/agent", "internal/agent/endpoint", "internal/agent/pemfile", "internal/host", "internal/proxy", "internal/revocation", "internal/capture", "internal/flow", "internal/admin"},
		[]string{"go.etcd.io/...", "./internal/issuer/ca"}, false,
		"a sidecar that is taken over must hold neither a signing key's code nor the store's"},
	{[]string{"internal/xds"}, []string{"go.etcd.io/...", "./internal/issuer/ca"}, false,
		"its client is part of the sidecar"},
	{[]string{"pkg/..."}, []string{"./internal/...", "google.golang.org/grpc/..."}, false,
		"others build on pkg: it must stay a small pure library"},
	{[]string{"internal/relay", "internal/tunnel"}, []string{"crypto/tls"}, true,
		"they move bytes and streams; who is on the other end is decided elsewhere"},
	{[]string{"cmd/..."}, []string{"testing", "./internal/meshtest/...", "./internal/store/storetest/...", "./internal/issuer/external/issuertest"}, false,
		"test code registers flags and has no place in what is shipped"},
	{[]string{"examples/..."}, []string{"./internal/...", "./pkg/..."}, false,
		"an app behind a sidecar knows nothing of the mesh"},
}

const (
	maxFile = 400 // lines of a file that is neither generated nor a test
	maxFunc = 80  // lines of a function
)
