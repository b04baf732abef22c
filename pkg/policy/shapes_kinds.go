package policy

// PolicyTest.
var (
	nameOrID = &shape{doc: "a workload's name, or an exact ID", forms: []*shape{
		labelShape.with("a workload's name"), textual("an exact ID", exactIDText, "/shop/payments"),
	}, example: "payments"}
	externalRef = textual("external:NAME", `^external:[a-z0-9-]{1,63}$`, "external:bank")

	texts       = &shape{forms: []*shape{anyText, listOf("", anyText)}, example: "text"}
	callRequest = mapping("request", "one request",
		must("method", textual("its method", "", "POST")),
		must("path", textual("its path, without the query", "", "/v1/charges")),
		may("host", textual("its host", "", "shop.example")),
		may("headers", free("its header", anyText, texts)),
		may("claims", free("claims of the end user's token, by issuer", anyText, free("claim: value", anyText, texts))))

	caseShape = mapping("case", "a question and the expected answer",
		must("from", &shape{doc: "who calls", forms: []*shape{nameOrID.forms[0], nameOrID.forms[1], nobody}, example: "orders"}),
		must("to", &shape{doc: "who is called", forms: []*shape{nameOrID.forms[0], nameOrID.forms[1], externalRef}, example: "payments"}),
		may("port", &shape{doc: "name or number; every declared port when left out", forms: []*shape{portNumber, portName}, example: "http"}),
		may("http", &shape{doc: "one request; every request when left out", forms: []*shape{textual("method and path", `^[^ ]* `, "POST /v1/charges"), callRequest}, example: "POST /v1/charges"}),
		may("grpc", textual("one gRPC method", protoMethod, "shop.v1.Payments/Charge")),
		may("at", timeShape.with("when it is asked; every window of time counts as open when left out")),
		must("expect", oneOf("what full enforcement shall say", "allow", "deny")))
	policyTestSpec = mapping("policyTestSpec", "questions with the expected answers",
		must("cases", opened(listOf("asked before a change lands", apartShape(caseShape, "http", "grpc")).between(1, 0))))
)

func apartShape(s *shape, fields ...string) *shape {
	s.apart = fields
	return s
}

// The kinds that are no rules, and those that only the root set holds.
var (
	defaultsSpec = mapping("defaultsSpec", "a door left open while a team moves in",
		must("to", doorSelector),
		must("audit", untilOnly))
	untilOnly    = mapping("", "what no rule allows is recorded only", must("until", timeShape.with("when the door closes")))
	externalSpec = mapping("externalSpec", "a destination that is no workload",
		must("host", textual("a host name or address in lower case; IPv6 stands in brackets", hostPattern, "bank.example")),
		must("port", portNumber),
		must("protocol", protocol),
		must("tls", truthValue("whether the caller's sidecar speaks TLS to it")))
	tokenIssuerSpec = mapping("tokenIssuerSpec", "an OpenID Connect issuer for when",
		must("issuer", textual("its https URL, as in the claim iss", httpsPattern, "https://login.example")),
		must("audience", someText.with("as in the claim aud")))

	bundleEndpointShape = mapping("", "where the bundle is served",
		must("url", textual("an https URL", httpsPattern, "https://mesh.partner.example:8444")),
		must("profile", oneOf("how the endpoint proves itself", HTTPSWeb, HTTPSSPIFFE)),
		may("endpointID", textual("profile https_spiffe: the SPIFFE ID that it must prove", `^spiffe://[^/]+/.`, "spiffe://partner.example/sallyport/server")))
	foreignShape = mapping("foreignWorkload", "what may be called there",
		must("id", idPath.with("the path of its SPIFFE ID")),
		must("ports", portsShape),
		must("endpoints", listOf("where its sidecars listen: IP address and port", endpointText).between(1, maxEndpoints)))
	trustDomainSpec = trustDomainShape()
)

func trustDomainShape() *shape {
	s := mapping("trustDomainSpec", "whom else to believe, for identities of that trust domain and no others",
		must("trustDomain", textual("the foreign trust domain", `^[a-z0-9._-]+$`, "partner.example").between(1, 255)),
		may("bundleEndpoint", bundleEndpointShape),
		may("bundle", textual("a SPIFFE bundle as JSON text: the first one or, without an endpoint, the only one", "", `"{}"`)),
		may("workloads", listOf("what may be called there", foreignShape).between(0, maxForeign)))
	s.some = []string{"bundleEndpoint", "bundle"}
	return s
}

// Kinds that limit what the other documents can say.
var (
	scopeSpec = mapping("scopeSpec", "what the set of this name may say",
		may("owners", listOf("who may change the set", textual("an owner", `^oidc-(group|subject):.`, "oidc-group:billing")).between(0, maxOwners)),
		must("ids", listOf("what it may define and guard", textual("a pattern over SPIFFE IDs", idPatternText, "/billing/**")).between(1, maxScopeIDs)),
		may("labels", free("labels that each of its workloads has, with the values that they may have", labelKey, listOf("any one of them", labelValue).between(1, maxScopeValues)).between(0, maxLabels)),
		may("evidence", listOf("evidence that may prove its workloads; what an entry leaves out is free", evidenceShape("partialEvidence", true)).between(0, maxAttest)))
	neverShape = mapping("", "who never reaches whom",
		must("from", fromSelector),
		must("to", toSelector))
	invariantSpec = mapping("invariantSpec", "what must never be, for everybody who could exist", must("never", neverShape))
)

// resource is the form of the documents of one kind.
type resource struct {
	kind, doc      string
	metadata, spec *shape
}

// resources are all kinds that have a form. Those that are not in kinds are refused
// by the parser, and left out of the schema.
var resources = []resource{
	{"Workload", "A named service: its identity, how it proves it, what it serves.", workloadMeta, opened(workloadSpec)},
	{"Policy", "Who may, and who must not, reach the workloads that to selects.", nameOnly, opened(policySpec)},
	{"PolicyTest", "Questions with the expected answers, asked before a change lands.", nameOnly, opened(policyTestSpec)},
	{"Invariant", "What must never be, proved over every identity that could exist. Root set only.", nameOnly, invariantSpec},
	{"Scope", "What the set of this name may say. Root set only.", nameOnly, opened(scopeSpec)},
	{"Defaults", "A door left open while a team moves in. Root set only.", nameOnly, defaultsSpec},
	{"External", "A destination that is no workload.", nameOnly, externalSpec},
	{"TrustDomain", "Whom else to believe. Root set only.", nameOnly, opened(trustDomainSpec)},
	{"TokenIssuer", "An OpenID Connect issuer whose tokens end users bring. Root set only.", nameOnly, tokenIssuerSpec},
}

func opened(s *shape) *shape {
	s.open = true
	return s
}

// metadataOf gives the form of the metadata of a kind.
func metadataOf(kind string) *shape {
	for _, r := range resources {
		if r.kind == kind {
			return r.metadata
		}
	}
	return nameOnly
}

// documentShape is a document of any of these kinds.
func documentShape(kinds []string) *shape {
	top := &shape{doc: "A document of Sallyport's policy language. See docs/policy.md.", types: []string{"object"}, open: true}
	for _, r := range resources {
		for _, kind := range kinds {
			if kind == r.kind {
				d := mapping("", r.doc,
					must("apiVersion", oneOf("version of the language", APIVersion)),
					must("kind", oneOf(r.doc, kind)),
					must("metadata", r.metadata), must("spec", r.spec))
				d.open = true
				top.variants = append(top.variants, variant{kind, d})
			}
		}
	}
	return top
}

// documentFields are those of every document.
var documentFields = mapping("", "", must("apiVersion", nil), must("kind", nil), must("metadata", nil), must("spec", nil)).known
