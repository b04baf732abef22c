//go:build e2e && linux

package peercred

import "testing"

// TestD6PIDReuse100000 is TestD6PIDReuse at length.
func TestD6PIDReuse100000(t *testing.T) { runInNamespace(t, "race 100000") }
