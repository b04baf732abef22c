// Package sallyportv1 is the control plane's gRPC API, generated from the .proto
// files beside it, and what they cannot say.
package sallyportv1

// InstanceMetadata is the key of the gRPC metadata in which a sidecar says which
// instance opens an Announce stream. It counts only where an external issuer's
// certificates do not say it, and only within the caller's own ID.
const InstanceMetadata = "sallyport-instance"
