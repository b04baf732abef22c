package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// APIVersion is what every document of this language version begins with.
const APIVersion = "sallyport.dev/v1"

// ParseFiles parses files (name → content) as the set called name, "" for the
// root set. All mistakes are reported at once, as [Errors].
func ParseFiles(name string, files map[string][]byte) (*Set, error) {
	var errs collector
	set := parseSet(name, files, &errs)
	if err := errs.err(); err != nil {
		return nil, err
	}
	return set, nil
}

// parseSet parses files in the order of their names.
func parseSet(name string, files map[string][]byte, errs *collector) *Set {
	set := &Set{Name: name, sources: map[string][]byte{}}
	if name != "" && !isLabel(name) {
		errs.add(&Error{File: printableName(name), Msg: "a set's name is a lower-case DNS label: a-z, 0-9 and -, at most 63"})
		return set
	}
	if !checkFiles(name, files, errs) {
		return set
	}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		f := fileReader{set: set, file: filePath(name, file), src: files[file], errs: errs}
		set.sources[f.file] = f.src
		f.read()
	}
	checkDuplicates([]*Set{set}, errs)
	return set
}

// checkFiles applies the limits to files that did not come through [ReadFiles].
func checkFiles(set string, files map[string][]byte, errs *collector) bool {
	size, ok := 0, true
	for _, file := range slices.Sorted(maps.Keys(files)) {
		size += len(files[file])
		if hidden(file) || !isResource(file) || strings.ContainsAny(file, `/\`) || printableName(file) != file {
			errs.add(&Error{File: printableName(filePath(set, file)), Msg: "not the name of a resource file; want NAME.yaml or NAME.yml"})
			ok = false
		}
	}
	if len(files) > MaxFiles {
		errs.add(&Error{File: set, Msg: fmt.Sprintf("more than %d files in one set", MaxFiles)})
		ok = false
	}
	if size > MaxSetSize {
		errs.add(&Error{File: set, Msg: fmt.Sprintf("more than %d MiB in one set", MaxSetSize>>20)})
		ok = false
	}
	return ok
}

func printableName(s string) string { return string(printable([]byte(s))) }

// document parses one document of a file.
func (f *fileReader) document(n *yaml.Node) {
	top, ok := f.object(n, "", documentFields)
	if !ok {
		return
	}
	version, vn, vok := top.text("apiVersion")
	if vok && version != APIVersion {
		f.fail(at(vn), "write "+APIVersion, "apiVersion %q is not supported by this version", shorten(version))
		return
	}
	kind, kn, ok := top.text("kind")
	if !ok || !vok || !f.knownKind(kind, kn) {
		return
	}
	mn, ok1 := top.need("metadata")
	sn, ok2 := top.need("spec")
	if !ok1 || !ok2 {
		return
	}
	meta, _ := f.object(mn, "metadata", metadataOf(kind).known)
	name, p := f.resourceName(meta)
	switch kind {
	case "Workload":
		f.workload(meta, name, p, sn)
	case "Policy":
		f.policy(name, p, sn)
	case "PolicyTest":
		f.policyTest(name, p, sn)
	case "TrustDomain":
		f.trustDomain(name, p, sn)
	case "TokenIssuer":
		f.tokenIssuer(name, p, sn)
	case "External":
		f.external(name, p, sn)
	case "Defaults":
		f.defaults(name, p, sn)
	case "Scope":
		f.scope(name, p, sn)
	case "Invariant":
		f.invariant(name, p, sn)
	}
}

// kinds are those of this version.
var kinds = []string{"Workload", "Policy", "PolicyTest", "Defaults", "External", "TrustDomain", "TokenIssuer", "Scope", "Invariant"}

// resourceName reads metadata.name; "" when it is wrong, which was reported.
func (f *fileReader) resourceName(meta object) (string, pos) {
	if meta.node.Kind != yaml.MappingNode {
		return "", pos{}
	}
	name, n, ok := meta.text("name")
	if ok && !isLabel(name) {
		f.fail(at(n), "", "metadata.name %q is not a lower-case DNS label: a-z, 0-9 and -, at most 63", shorten(name))
		ok = false
	}
	if !ok {
		return "", pos{}
	}
	return name, at(n)
}

// knownKind reports whether kind is one of this version, and says what is wrong
// with it otherwise.
func (f *fileReader) knownKind(kind string, n *yaml.Node) bool {
	switch {
	case slices.Contains(kinds, kind):
		return true
	case kind == "Mesh":
		f.fail(at(n), "keep it in mesh.yaml, outside the policy folder", "kind Mesh is read by `sallyport up`; it is not a policy resource")
	default:
		hint := didYouMean(kind, kinds)
		if hint == "" {
			hint = "known kinds: " + strings.Join(kinds, ", ")
		}
		f.fail(at(n), hint, "unknown kind %q", shorten(kind))
	}
	return false
}

// isLabel reports whether s is a lower-case DNS label (RFC 1123 section 2.1).
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return only(s, "-")
}

// only reports whether s holds nothing but a-z, 0-9 and the characters of more.
func only(s, more string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && strings.IndexByte(more, c) < 0 {
			return false
		}
	}
	return true
}
