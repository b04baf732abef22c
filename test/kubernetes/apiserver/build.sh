#!/usr/bin/env bash
# Prints the path of a kube-apiserver built from this folder's module. It builds
# only when the user's cache folder has none of this very source yet: that takes
# some minutes and 3 GB of memory. Nothing but Go modules is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

version=$(sed -n 's/^\tk8s.io\/kubernetes v//p' go.mod)
hash=$(cat go.mod main.go | sha256sum | cut -c1-12)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/sallyport # as Go's os.UserCacheDir
binary=$dir/kube-apiserver-$version-$hash

if [ ! -x "$binary" ]; then
  mkdir -p "$dir"
  # Two builds at once would only slow each other down.
  exec 9>"$dir/kube-apiserver.lock"
  flock 9
  if [ ! -x "$binary" ]; then
    echo "building kube-apiserver $version, which takes some minutes" >&2
    GOTOOLCHAIN=auto GOFLAGS=-buildvcs=false CGO_ENABLED=0 GOWORK=off \
      nice go build -trimpath -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=v$version" -o "$binary.$$" . >&2
    mv "$binary.$$" "$binary"
  fi
fi
echo "$binary"
