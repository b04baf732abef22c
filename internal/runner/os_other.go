//go:build !linux

package runner

import (
	"errors"
	"syscall"
)

var errLinuxOnly = errors.New("`sallyport up` runs on Linux only: elsewhere nothing makes sure that no process is left behind")

func lockState(string) (func(), error) { return nil, errLinuxOnly }

// The rest is never reached, because lockState comes first.

func stateHolder(string) string { return "" }

func childAttributes() *syscall.SysProcAttr { return nil }

func runOnOneThread(work <-chan func()) {
	for range work {
	}
}

func signalGroup(int, syscall.Signal) error { return errLinuxOnly }

func awaitExit(int) {}
