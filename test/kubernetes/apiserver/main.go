// Command kube-apiserver is Kubernetes's own API server, built from its module
// and nothing else. It is a module of its own so that what it needs stays out of
// Sallyport's go.mod; build.sh builds it, package kubernetes's tests run it.
package main

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() { os.Exit(cli.Run(app.NewAPIServerCommand())) }
