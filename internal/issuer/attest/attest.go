// Package attest holds the kinds of evidence by which a workload's sidecar can
// prove who it is, one file each: the evidence's form and how to check it.
//
// It keeps no state and decides nothing: which evidence may be which workload is
// package registry's, the dialogue is package issuer's. Both ends share it, so it
// holds no signing of certificates.
package attest

import (
	"errors"
	"time"
)

// Selectors are what evidence says of its bearer: the values found for each key.
// A key that was not found is absent.
type Selectors = map[string][]string // :: key → values

// Verified is evidence that was checked.
type Verified struct {
	Kind   string // a Kind constant of this package
	Issuer string // who vouches: the name under which the control plane configured it
	// Selectors is what a Workload's attest list can ask for.
	Selectors Selectors
	// Subject describes the bearer, for people and the audit log.
	Subject string
	// Once, the hex SHA-256 of this very evidence, names what may be redeemed
	// once. It is empty where a challenge makes replay impossible.
	Once string
	// Expires is when the evidence ends by itself; Once need not be remembered
	// after it. Zero where Once is empty.
	Expires time.Time
}

var (
	// ErrBadEvidence says that evidence is not accepted, and will not be if it is
	// shown again.
	ErrBadEvidence = errors.New("the evidence is not accepted")
	// ErrUnreachable says that who vouches for the evidence could not be asked,
	// so that nothing is known of it; a later try may fare better.
	ErrUnreachable = errors.New("the evidence's issuer cannot be asked now")
)
