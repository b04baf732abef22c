package agent

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// permanentError is one that waiting does not cure.
type permanentError struct{ error }

// Unwrap returns the cause.
func (e permanentError) Unwrap() error { return e.error }

func permanent(err error) error { return permanentError{err} }

func isPermanent(err error) bool {
	_, ok := errors.AsType[permanentError](err)
	return ok
}

// refusal is a control plane's considered no: it understood and declined.
type refusal struct {
	error
	code codes.Code
}

// codeOf is what the control plane refused with; OK where it did not refuse.
func codeOf(err error) codes.Code {
	r, _ := errors.AsType[refusal](err)
	return r.code
}

func isRefusal(err error) bool {
	_, ok := errors.AsType[refusal](err)
	return ok
}

// checkAddress is what to do about an unreachable control plane.
const checkAddress = "check controlPlane in the configuration and that it runs"

// unreachable says that nothing could be asked of the control plane.
type unreachable struct {
	addr    string
	lasting time.Duration // zero: not known
	cause   error
}

// Error implements error.
func (e unreachable) Error() string {
	if e.lasting == 0 {
		return fmt.Sprintf("control plane unreachable at %s: %v", e.addr, e.cause)
	}
	return fmt.Sprintf("control plane unreachable at %s for %v: %v", e.addr, e.lasting, e.cause)
}

// Unwrap returns the cause.
func (e unreachable) Unwrap() error { return e.cause }

func isUnreachable(err error) bool {
	_, ok := errors.AsType[unreachable](err)
	return ok
}

// gaveUp is what Run says when the control plane was unreachable for so long.
func gaveUp(err error, lasting time.Duration) error {
	u, _ := errors.AsType[unreachable](err)
	u.lasting = lasting
	return fmt.Errorf("%w; %s", u, checkAddress)
}

// explain turns a gRPC status into a line for people. What the control plane
// refused it will refuse again; all else is worth another try.
func (l *link) explain(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	switch st.Code() {
	case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument, codes.FailedPrecondition, codes.Unimplemented:
		return permanent(refusal{fmt.Errorf("the control plane at %s refused: %s", l.addr, st.Message()), st.Code()})
	}
	return fmt.Errorf("control plane at %s: %s (%s)", l.addr, st.Message(), st.Code())
}
