package agent

import (
	"errors"
	"fmt"

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
type refusal struct{ error }

func isRefusal(err error) bool {
	_, ok := errors.AsType[refusal](err)
	return ok
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
		return permanent(refusal{fmt.Errorf("the control plane at %s refused: %s", l.addr, st.Message())})
	}
	return fmt.Errorf("control plane at %s: %s (%s)", l.addr, st.Message(), st.Code())
}
