//go:build e2e && linux

package peercred

import "testing"

// TestPIDReuse100000 is TestPIDReuse at length.
func TestPIDReuse100000(t *testing.T) { runRace(t, 100_000) }
