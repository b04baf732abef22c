//go:build pkcs11 && cgo

// Command sallyport-pkcs11 lets the control plane's CA use a key in a PKCS#11
// token. It is a program of its own because a token's library is C code: the
// control plane stays static, and a library that crashes takes nothing with it.
//
// It reads one JSON object from stdin, does what it says and writes one to
// stdout; package ca has both. It decides nothing: whoever may run it with the
// PIN file may use the token.
package main

import (
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/ThalesGroup/crypto11"
)

type request struct {
	Op     string `json:"op"`
	ID     []byte `json:"id"`
	Digest []byte `json:"digest"`
}

type response struct {
	ID        []byte `json:"id,omitempty"`
	Public    []byte `json:"public,omitempty"`
	Signature []byte `json:"signature,omitempty"`
	Error     string `json:"error,omitempty"`
}

// label is what an operator sees in a list of the token's objects.
const label = "sallyport-root"

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout)) }

func run(args []string, stdin io.Reader, stdout io.Writer) int {
	resp, err := answer(args, stdin)
	code := 0
	if err != nil {
		resp, code = response{Error: err.Error()}, 1
	}
	if err := json.NewEncoder(stdout).Encode(resp); err != nil {
		return 1
	}
	return code
}

func answer(args []string, stdin io.Reader) (resp response, err error) {
	flags := flag.NewFlagSet("sallyport-pkcs11", flag.ContinueOnError)
	module := flags.String("module", "", "path of the token's PKCS#11 library")
	token := flags.String("token", "", "label of the token")
	pinFile := flags.String("pin-file", "", "file with the user's PIN, 0600")
	if err := flags.Parse(args); err != nil {
		return resp, err
	}
	var req request
	if err := json.NewDecoder(io.LimitReader(stdin, 4<<10)).Decode(&req); err != nil {
		return resp, fmt.Errorf("reading the request: %w", err)
	}
	pin, err := readPIN(*pinFile)
	if err != nil {
		return resp, err
	}
	ctx, err := crypto11.Configure(&crypto11.Config{Path: *module, TokenLabel: *token, Pin: pin})
	if err != nil {
		return resp, fmt.Errorf("opening the token: %w", err)
	}
	defer func() { err = errors.Join(err, ctx.Close()) }()
	key, id, err := keyFor(ctx, req)
	if err != nil {
		return resp, err
	}
	switch req.Op {
	case "generate", "public":
		resp.ID = id
		resp.Public, err = x509.MarshalPKIXPublicKey(key.Public())
	case "sign":
		resp.Signature, err = key.Sign(rand.Reader, req.Digest, crypto.SHA256)
	default:
		err = fmt.Errorf("unknown operation %q", req.Op)
	}
	return resp, err
}

func keyFor(ctx *crypto11.Context, req request) (crypto11.Signer, []byte, error) {
	if req.Op == "generate" {
		id := make([]byte, 16)
		if _, err := rand.Read(id); err != nil {
			return nil, nil, err
		}
		key, err := ctx.GenerateECDSAKeyPairWithLabel(id, []byte(label), elliptic.P256())
		if err != nil {
			return nil, nil, fmt.Errorf("making a key: %w", err)
		}
		return key, id, nil
	}
	key, err := ctx.FindKeyPair(req.ID, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("looking for key %x: %w", req.ID, err)
	}
	if key == nil {
		return nil, nil, fmt.Errorf("the token has no key %x", req.ID)
	}
	return key, req.ID, nil
}

func readPIN(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("reading the PIN: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("PIN file %s has mode %04o and can be read by other users: run chmod 600 %[1]s", path, st.Mode().Perm())
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("reading the PIN: %w", err)
	}
	pin, _, _ := strings.Cut(string(data), "\n")
	if pin = strings.TrimSuffix(pin, "\r"); pin == "" {
		return "", fmt.Errorf("PIN file %s is empty", path)
	}
	return pin, nil
}
