// Package attest holds the kinds of evidence by which a workload's sidecar can
// prove who it is, one file each: the evidence's form and how to check it.
//
// It keeps no state and decides nothing: which evidence may be which workload is
// package registry's, the dialogue is package issuer's. Both ends share it, so it
// holds no signing of certificates.
package attest

import "fmt"

// CheckKind refuses a kind of evidence that this version does not have, by name.
func CheckKind(kind string) error {
	if kind != KindJoinToken {
		return fmt.Errorf("attest kind %q is not supported by this version; supported: %s", kind, KindJoinToken)
	}
	return nil
}
