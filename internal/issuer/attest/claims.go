package attest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
)

// Limits on a token's claims. A token that exceeds them is refused as a whole:
// selectors that are left out without a word would be looked for in vain.
const (
	maxClaimValues = 256 // in all
	maxClaimName   = 256 // bytes, with the names around it
	maxClaimValue  = 1024
	maxClaimDepth  = 8
)

// claimSelectors makes selectors "claims.NAME" of a token's claims: strings,
// numbers as they are written, booleans as true and false, arrays of these as
// several values, objects by their members' names after a dot. Left out are null,
// empty strings, arrays and objects inside arrays, and the claims that tell one
// token from the next: exp, iat, nbf, jti.
func claimSelectors(payload []byte) (Selectors, error) {
	d := json.NewDecoder(bytes.NewReader(payload))
	d.UseNumber()
	var claims map[string]any
	if err := d.Decode(&claims); err != nil {
		return nil, fmt.Errorf("parsing the claims: %w", err)
	}
	for _, name := range []string{"exp", "iat", "nbf", "jti"} {
		delete(claims, name)
	}
	c := &claimReader{out: Selectors{}}
	if err := c.object("claims", claims, 1); err != nil {
		return nil, err
	}
	return c.out, nil
}

type claimReader struct {
	out    Selectors
	values int
}

func (c *claimReader) object(name string, members map[string]any, depth int) error {
	if depth > maxClaimDepth {
		return fmt.Errorf("claims %d levels deep, at most %d accepted", depth, maxClaimDepth)
	}
	for member, value := range members {
		key := name + "." + member
		if len(key) > maxClaimName {
			return fmt.Errorf("claim with a name of %d bytes, at most %d accepted", len(key), maxClaimName)
		}
		if inner, ok := value.(map[string]any); ok {
			if err := c.object(key, inner, depth+1); err != nil {
				return err
			}
			continue
		}
		// {"a.b": 1} and {"a": {"b": 2}}: who chooses one name must not forge the other
		if _, ok := c.out[key]; ok {
			return fmt.Errorf("two claims that are both called %.64q", key)
		}
		list, ok := value.([]any)
		if !ok {
			list = []any{value}
		}
		for _, v := range list {
			if err := c.add(key, v); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *claimReader) add(key string, value any) error {
	var text string
	switch v := value.(type) {
	case string:
		text = v
	case json.Number:
		text = v.String()
	case bool:
		text = strconv.FormatBool(v)
	}
	switch {
	case text == "":
		return nil
	case len(text) > maxClaimValue:
		return fmt.Errorf("claim %.64q with a value of %d bytes, at most %d accepted", key, len(text), maxClaimValue)
	}
	if c.values++; c.values > maxClaimValues {
		return fmt.Errorf("claims with more than %d values", maxClaimValues)
	}
	c.out[key] = append(c.out[key], text)
	return nil
}
