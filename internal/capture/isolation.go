package capture

import (
	"fmt"
	"os"
	"slices"
)

// Isolation says whether admitting only certain users protects a sidecar's
// identity from other programs on the machine.
type Isolation struct {
	On     bool
	Reason string // one sentence for the operator
}

// IsolationOf judges a list of allowed users for a sidecar that runs as the
// user of this process. A program of the sidecar's own user is not kept out by
// any check: were it refused at the door, it could still read the sidecar's
// memory.
func IsolationOf(allowUIDs []uint32) Isolation {
	return isolationOf(ownUID(), allowUIDs)
}

func isolationOf(own uint32, allowUIDs []uint32) Isolation {
	if slices.Contains(allowUIDs, own) {
		return Isolation{Reason: fmt.Sprintf(
			"local isolation is off: app and sidecar both run as uid %d, and any program of that user can speak with this identity; run the app as another user and allow only that one", own)}
	}
	return Isolation{On: true, Reason: fmt.Sprintf("local isolation is on: only uids %d may speak with this identity", allowUIDs)}
}

func ownUID() uint32 { return uint32(os.Geteuid()) }
