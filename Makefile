# Sallyport. `make` without a target lists what there is to make.
SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Go fetches the version that go.mod asks for.
export GOTOOLCHAIN := auto
GO_VERSION  := $(shell sed -n 's/^go //p' go.mod)
VERSION     := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
PROTOC_GEN_GO := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
FUZZTIME    ?= 10s
DECISIONS   ?= 10000000
UNIVERSES   ?= 20000

# The race detector needs a C compiler.
CC_FOUND    := $(shell command -v "$$(go env CC 2>/dev/null)" 2>/dev/null)
RACE        := $(if $(CC_FOUND),-race)

# name → package of every program
PROGRAMS := sallyport-controlplane=./cmd/controlplane sallyport-proxy=./cmd/proxy sallyport=./cmd/sallyport shop=./examples/shop secrets=./examples/secrets

.PHONY: help build pkcs11 demo test test-long smoke e2e kubernetes lint vuln fuzz proto clean have-go

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

have-go:
	@command -v go >/dev/null || { echo "go is not on PATH. Install Go 1.21 or later (https://go.dev/dl), or add its folder: export PATH=\$$PATH:/usr/local/go/bin" >&2; exit 1; }

build: have-go ## build the programs into bin/: static, stripped, version stamped
	@mkdir -p bin
	@for p in $(PROGRAMS); do \
	  CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o "bin/$${p%%=*}" "$${p#*=}"; \
	done

pkcs11: have-go ## build bin/sallyport-pkcs11, for roots in a PKCS#11 token (needs a C compiler)
	@mkdir -p bin
	@CGO_ENABLED=1 go build -tags pkcs11 -trimpath -ldflags '-s -w' -o bin/sallyport-pkcs11 ./internal/issuer/ca/pkcs11

demo: build ## run the example shop until Ctrl-C
	@exec bin/sallyport up examples/shop

test: have-go ## run every test that needs no root and no installed server
	@$(if $(CC_FOUND),,echo "no C compiler found: testing without the race detector")
	@$(if $(CC_FOUND),CGO_ENABLED=1) go test $(RACE) ./...

test-long: have-go ## ask evaluator and reference DECISIONS questions, prove UNIVERSES sets by force
	@go test -count=1 -timeout 60m ./pkg/policy -run '^TestDecideAgreesWithReference$$' -decisions $(DECISIONS)
	@go test -count=1 -timeout 60m ./pkg/policy -run '^TestProveAgreesWithBruteForce$$' -universes $(UNIVERSES)

smoke: build ## run the demo's story and check it
	@go test -tags smoke -count=1 ./test/smoke/...

e2e: build ## run the programs through faults: kills, rotations, images, units
	@go test -tags e2e -count=1 -v ./test/e2e/... ./internal/meshtest
	@go test -tags e2e -count=1 -v -timeout 30m -run '^TestD6PIDReuse100000$$' ./internal/peercred

kubernetes: build ## run against a real kube-apiserver, built once (some minutes)
	@test/kubernetes/apiserver/build.sh >/dev/null
	@go test -tags kubernetes -count=1 -v ./test/kubernetes/...

lint: have-go ## check format, vet, staticcheck and the import rows
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "not formatted:"; echo "$$unformatted"; exit 1; }
	@go vet ./...
	@go vet -tags smoke,e2e,kubernetes ./test/... ./internal/meshtest ./internal/peercred
	@$(if $(CC_FOUND),CGO_ENABLED=1 go vet -tags pkcs11 ./internal/issuer/ca/pkcs11)
	@GOTOOLCHAIN=go$(GO_VERSION)+auto go run $(STATICCHECK) -tags smoke,e2e,kubernetes ./...
	@go test -count=1 ./internal/arch

vuln: have-go ## look for known vulnerabilities (needs the public database)
	@GOTOOLCHAIN=go$(GO_VERSION)+auto go run $(GOVULNCHECK) ./...

fuzz: have-go ## run each fuzz target for FUZZTIME
	@go test -list '^Fuzz' ./... \
	  | awk '/^Fuzz/ {name[n++] = $$1} /^ok/ {for (i = 0; i < n; i++) print $$2, name[i]; n = 0}' \
	  | while read -r pkg name; do \
	      go test "$$pkg" -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME); \
	    done

proto: have-go ## regenerate api/ from its .proto files (needs protoc 3.21 or later)
	@command -v protoc >/dev/null || { echo "protoc is not on PATH; Debian has it in protobuf-compiler" >&2; exit 1; }
	@mkdir -p bin/protoc
	@for m in $(PROTOC_GEN_GO) $(PROTOC_GRPC); do GOBIN=$$PWD/bin/protoc go install "$$m"; done
	@cd api/sallyport/v1 && PATH="$$OLDPWD/bin/protoc:$$PATH" protoc -I. --go_out=. --go_opt=paths=source_relative \
	  --go-grpc_out=. --go-grpc_opt=paths=source_relative *.proto

clean: ## remove what was built and the demo's state
	@lock=examples/shop/.sallyport/up.lock; \
	if [ -e "$$lock" ] && command -v flock >/dev/null && ! flock -n "$$lock" true; then \
	  echo "the demo is running (pid $$(cat "$$lock")): stop it with Ctrl-C first" >&2; exit 1; \
	fi
	@rm -rf bin examples/shop/.sallyport
