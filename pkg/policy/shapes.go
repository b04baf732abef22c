package policy

import "slices"

// Patterns of text. Each admits all that the parser does.
const (
	labelPattern    = `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`
	labelText63     = `^[A-Za-z0-9_./-]{1,63}$`
	idPatternText   = `^(/|spiffe://)[^{}]+$`
	exactIDText     = `^(/|spiffe://)[^{}*]+$`
	timePattern     = `^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.,]0+)?(Z|[+-][0-9]{2}:[0-9]{2})$`
	httpsPattern    = `^[Hh][Tt][Tt][Pp][Ss]://.`
	protoName       = `^[A-Za-z_][A-Za-z0-9_]*$`
	protoFullName   = `^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`
	protoMethod     = `^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*/[A-Za-z_][A-Za-z0-9_]*$`
	hostPattern     = `^[a-z0-9._:\[\]-]+$`
	durationPattern = `^[+]?[0-9.hmsnuµμ]+$`
)

// Values that stand in several places.
var (
	labelShape   = textual("a lower-case DNS label", labelPattern, "payments").between(1, 63)
	labelKey     = textual("key of a label", labelText63, "team")
	labelValue   = textual("value of a label; what YAML takes for a number or a date stands in quotes", labelText63, "billing")
	timeShape    = textual("RFC 3339 in whole seconds with a zone", timePattern, "2030-01-01T00:00:00Z")
	anyText      = textual("", "", "text")
	someText     = textual("", "", "text").between(1, 0)
	portNumber   = &shape{doc: "number of a port", types: []string{"integer"}, low: 1, high: 65535, example: "8080"}
	portName     = textual("name of a port; not all", `^[a-z0-9-]*[a-z][a-z0-9-]*$`, "http")
	portOrAll    = &shape{doc: "a port's name or number; [all] alone means every port", forms: []*shape{portNumber, portName}, example: "http"}
	protocol     = oneOf("what the port speaks; declared, never guessed", string(TCP), string(HTTP), string(GRPC))
	endpointText = textual("as in 192.0.2.7:15008", `:[0-9]+$`, `"192.0.2.7:15008"`)
	idPath       = textual("the path of a SPIFFE ID", `^/[^*{}]+$`, "/shop/payments")

	nameOnly = mapping("metadata", "how the document is called", must("name", labelShape.with("how the document is called; a lower-case DNS label")))
)

// Selectors, by where they stand.
var (
	byWorkload  = may("workload", labelShape.with("the workload of this name"))
	byLabels    = may("labels", free("the workloads that have all of these labels", labelKey, labelValue).between(1, maxLabels))
	byID        = may("id", textual("a pattern over SPIFFE IDs: * is one segment, a final ** one or more; /** is everyone in this trust domain", idPatternText, "/shop/*"))
	byExternal  = may("external", labelShape.with("the External of this name"))
	byAnonymous = may("anonymous", &shape{doc: "callers without an identity; true", types: []string{"boolean"}, enum: []string{"true"}, example: "true"})

	fromSelector = selectorShape("selectorFrom", "who calls: one of workload, labels, id and anonymous", byWorkload, byLabels, byID, byAnonymous)
	toSelector   = selectorShape("selectorTo", "what is guarded: one of workload, labels, id and external", byWorkload, byLabels, byID, byExternal)
	doorSelector = selectorShape("selector", "one of workload, labels and id", byWorkload, byLabels, byID)
	nobody       = selectorShape("selectorAnonymous", "callers without an identity", byAnonymous)
)

func selectorShape(name, doc string, forms ...member) *shape {
	s := mapping(name, doc, forms...)
	s.one = true
	return s
}

// Workload.
var (
	plaintextShape = mapping("", "callers without mutual TLS may come while a team moves in; rules admit them by {anonymous: true} only",
		must("until", timeShape.with("until when")))
	portShape = mapping("port", "a port that is served",
		must("name", portName.with("a DNS label with a letter, other than all; unique in the workload")),
		must("port", portNumber.with("what callers name on the wire; unique in the workload")),
		must("protocol", protocol),
		may("plaintext", plaintextShape),
		may("direct", portNumber.with("where the sidecar also takes plain mutual TLS for this port, for callers without sidecar; unique in the workload")))
	evidenceEntry = evidenceShape("evidence", false)
	portsShape    = listOf("what is served", portShape).between(0, MaxPorts)

	maxStaleShape = mapping("", "what becomes of callers while the revocation list of the sidecar is old",
		must("after", textual("age of the list: 10s to 720h", durationPattern, "1h")),
		must("then", oneOf("refuse new connections, or hold and raise an alarm", "hold", "refuse")))
	workloadMeta = mapping("workloadMetadata", "how the workload is called",
		must("name", labelShape.with("how policies, tests and tokens call the workload; unique in all sets")),
		may("labels", free("what selectors match", labelKey, textual("value of a label; of a template it may be {selector}", `^([A-Za-z0-9_./-]{1,63}|\{[^{}]+\})$`, "billing")).between(0, maxLabels)))
	workloadSpec = mapping("workloadSpec", "who the workload is and what it serves",
		may("id", textual("the path of its SPIFFE ID, /NAME when left out; {selector} in a segment makes a template", `^/[^*]+$`, "/shop/payments")),
		may("attest", listOf("the evidence that proves it; any one is enough, none means that it cannot enrol", evidenceEntry).between(0, maxAttest)),
		may("ports", portsShape),
		may("maxStale", maxStaleShape),
		may("endpoints", listOf("where instances without sidecar serve: IP address and a declared port of protocol grpc", endpointText).between(0, MaxEndpoints)))
)

// Rules.
var (
	httpShape = someShape(mapping("httpMatch", "requests: all of what is set must match",
		may("methods", listOf("any one of them", textual("a method in upper case", `^[A-Z0-9_-]+$`, "POST")).between(1, MaxValues)),
		may("paths", listOf("any one of them", textual("a path by segment, without the query: * is one segment, a final ** one or more", `^[/*]`, "/v1/charges")).between(1, MaxValues)),
		may("hosts", listOf("any one of them", textual("a host in lower case, without port and wildcard", hostPattern, "shop.example")).between(1, MaxValues)),
		may("headers", listOf("all of them", headerShape).between(1, MaxValues))))
	headerShape = eitherShape(mapping("", "a header: its value, or that it is there",
		must("name", textual("name of the header; the host is asked for by hosts", `^[A-Za-z0-9_-]+$`, "x-team")),
		may("equals", textual("the value; printable ASCII without commas", `^[!-+\--~]([ -+\--~]*[!-+\--~])?$`, "sales")),
		may("present", byAnonymous.shape.with("true: any value"))), "equals", "present")
	grpcShape = mapping("grpcMatch", "gRPC methods of one service",
		must("service", textual("the full name of the service", protoFullName, "shop.v1.Payments").between(1, 512)),
		may("methods", listOf("any one of them; none is every method", textual("name of a method", protoName, "Charge").between(1, 512)).between(1, MaxValues)))
	whenShape = mapping("when", "claims of an end user's token; all must match",
		must("issuer", labelShape.with("name of a TokenIssuer")),
		must("claims", free("claim: value", someText.with("name of a claim"), someText.with("its value")).between(1, MaxValues)))

	allowShape = ruleShape("allow", "a rule that lets in",
		later("mode", "remove it: an allow grants, or it does not exist; a door left open for a time is kind: Defaults"))
	denyShape = ruleShape("deny", "a guardrail: wins over every allow",
		may("mode", oneOf("audit: recorded, not enforced", "audit")))
	policySpec = policySpecShape()
)

func ruleShape(name, doc string, mode member) *shape {
	s := mapping(name, doc,
		must("from", listOf("who calls; any one matches", fromSelector).between(1, 0)),
		must("ports", listOf("names and numbers of ports, or [all]", portOrAll).between(1, MaxPorts)),
		may("http", listOf("which requests; any one matches, none means the whole connection", httpShape).between(1, MaxMatches)),
		may("grpc", listOf("which gRPC methods; any one matches", grpcShape).between(1, MaxMatches)),
		may("when", whenShape),
		may("since", timeShape.with("the rule holds from then on")),
		may("until", timeShape.with("the rule holds until before then")),
		mode,
		may("reason", textual("one line, told to operators and, for a deny, to whoever is refused", "", "charging belongs to orders").between(0, MaxReason)))
	s.apart, s.few = []string{"http", "grpc"}, 2
	return s
}

// someShape has at least one of its fields.
func someShape(s *shape) *shape {
	s.some = s.names()
	return s
}

// eitherShape has exactly one of two fields.
func eitherShape(s *shape, a, b string) *shape {
	s.some, s.apart = []string{a, b}, []string{a, b}
	return s
}

func policySpecShape() *shape {
	s := mapping("policySpec", "who may reach what; allow, deny or both must be there",
		must("to", toSelector),
		may("allow", opened(listOf("who may; what no allow names is denied", allowShape))),
		may("deny", opened(listOf("who must not, whatever an allow says", denyShape))))
	s.some = []string{"allow", "deny"}
	return s
}

// evidenceShape is an entry of attest, in any of its kinds. A partial one is a
// limit to what such entries may say: an issuer or an agent is enough for it.
func evidenceShape(name string, partial bool) *shape {
	s := &shape{name: name, doc: "one kind of evidence and the selectors that it must have", types: []string{"object"}}
	for _, kind := range kindsOfEvidence() {
		form, _ := formOf(kind)
		fields := []member{must("kind", oneOf("kind of evidence", kind))}
		if form.issuer != "" {
			fields = append(fields, may(form.issuer, labelShape.with("an entry under attest of the control plane's configuration; left out, the only one there")))
		}
		if form.via {
			fields = append(fields, member{"via", true, "", listOf("the agents that are believed", idPath.with("an agent's ID, without wildcard")).between(1, 0)})
		}
		for _, key := range form.selectors {
			fields = append(fields, may(key, evidenceValue(key)))
		}
		if form.claims {
			fields = append(fields, member{"claims", !partial, "", free("claims of the token; a dot leads into an object", someText.with("name of a claim"), evidenceValue("claims")).between(1, 0)})
		}
		entry := mapping("", evidenceDocs[kind], fields...)
		switch { // or it would accept any evidence
		case len(form.required) > 0 || partial && form.via:
		case partial && form.claims:
			entry.some = []string{form.issuer, "claims"}
		case partial && form.issuer != "":
			entry.some = append([]string{form.issuer}, form.selectors...)
		default:
			entry.some = form.selectors
		}
		s.variants = append(s.variants, variant{kind, entry})
	}
	return s
}

// evidenceValue is what evidence says: numbers are what people write for users.
func evidenceValue(key string) *shape {
	s := &shape{doc: evidenceDocs[key], types: []string{"string", "integer", "boolean"}, low: 0, high: maxSelector, example: "shop"}
	switch {
	case slices.Contains([]string{"fingerprint", "issuerFingerprint", "sha256"}, key):
		s.types, s.pattern = []string{"string", "integer"}, `^[0-9a-f]{64}$`
		s.example = `"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"`
	case key == "uid" || key == "gid":
		s.types, s.pattern, s.example = []string{"string", "integer"}, `^[0-9]+$`, "1000"
	default:
		s.pattern = `^[^{}]+$`
	}
	return s
}

// evidenceDocs says what kinds of evidence and their selectors are.
var evidenceDocs = map[string]string{
	JoinToken:  "a token that an operator made for this workload",
	X509Pop:    "a certificate of another PKI and possession of its key",
	Kubernetes: "a projected service-account token",
	OIDC:       "an ID token of an OpenID Connect issuer",
	Unix:       "the word of an agent about a process on its own host",

	"commonName": "the subject's common name", "organization": "an organization of the subject", "organizationalUnit": "an organizational unit of the subject",
	"dns": "a DNS name of the certificate", "uri": "a URI of the certificate", "ip": "an address of the certificate", "email": "a mail address of the certificate",
	"fingerprint": "SHA-256 of the certificate, in hex", "issuerFingerprint": "SHA-256 of the issuer's certificate, in hex",
	"namespace": "namespace of the service account", "serviceAccount": "name of the service account",
	"podName": "name of the pod", "podUID": "UID of the pod", "node": "name of the node",
	"uid": "number of the user", "gid": "number of the group", "user": "name of the user", "group": "name of one of its groups",
	"path": "the executable", "sha256": "SHA-256 of the executable, in hex", "unit": "unit of systemd", "container": "ID of the container", "cgroup": "control group",
	"claims": "value of the claim",
}
