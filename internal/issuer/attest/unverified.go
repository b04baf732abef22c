package attest

// Unverified reads the selectors of a token that nobody has checked, and the kind
// of evidence that it seems to be: [KindKubernetes], [KindOIDC], or "" for what is
// no token. It is for explaining to operators why a token is refused, never for
// admitting.
func Unverified(token string) (kind string, s Selectors) {
	b, err := readBearer(token)
	if err != nil {
		return "", nil
	}
	claims, err := claimSelectors(b.payload)
	if err != nil {
		return KindOIDC, nil
	}
	if subject := claims["claims.sub"]; len(subject) == 1 {
		if who, err := accountOfClaims(subject[0], b.payload); err == nil {
			return KindKubernetes, who.selectors()
		}
	}
	return KindOIDC, claims
}
