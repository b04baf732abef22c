package issuer

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-mesh/sallyport/internal/issuer/attest"
	"github.com/sallyport-mesh/sallyport/internal/issuer/registry"
)

var (
	errMalformed = errors.New("malformed enrolment message")
	errBusy      = errors.New("too many enrolments in progress; try again")
	errTooOften  = errors.New("SVIDs are asked for too often; try again in some seconds")
	errAnonymous = errors.New("renewing needs an SVID; enrol first")
	errExpired   = errors.New("the SVID of this connection expired")
	errClock     = errors.New("clock skew")
	errConfig    = errors.New("this evidence cannot be checked here")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errMalformed, fmt.Sprintf(format, args...))
}

// toStatus maps errors to gRPC codes. Clients give up on Unauthenticated,
// PermissionDenied, InvalidArgument and FailedPrecondition and try again on all
// others, so what is not listed must be temporary. Its details stay here.
func toStatus(err error) error {
	if stream, ok := errors.AsType[streamError](err); ok {
		return stream.error
	}
	for _, m := range []struct {
		code  codes.Code
		cause []error
	}{
		{codes.InvalidArgument, []error{errMalformed}},
		{codes.FailedPrecondition, []error{errClock, errConfig, registry.ErrAmbiguous}},
		{codes.ResourceExhausted, []error{errBusy, errTooOften}},
		{codes.Unavailable, []error{registry.ErrNotReady, registry.ErrReadmitting, attest.ErrUnreachable}},
		{codes.Unauthenticated, []error{
			errAnonymous, errExpired, attest.ErrBadProof, registry.ErrUnknownToken, registry.ErrTokenUsed,
			registry.ErrTokenExpired, registry.ErrUnknownInstance, registry.ErrEvidenceUsed, attest.ErrBadEvidence,
		}},
		{codes.PermissionDenied, []error{registry.ErrUnknownWorkload, registry.ErrNotAttested, registry.ErrNoMatch, registry.ErrVouched, registry.ErrRevoked}},
		{codes.DeadlineExceeded, []error{context.DeadlineExceeded}},
		{codes.Canceled, []error{context.Canceled}},
	} {
		for _, cause := range m.cause {
			if errors.Is(err, cause) {
				return status.Error(m.code, err.Error())
			}
		}
	}
	return status.Error(codes.Internal, "the control plane could not issue an SVID; its log says why")
}
