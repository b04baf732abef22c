package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// app is the workload.
type app struct {
	socket   string // of the Workload API; "": SPIFFE_ENDPOINT_SOCKET says it
	vault    string // URL
	audience string // whom the JWT-SVID is for
	role     string
	path     string // of the secret, below /v1/
}

func appFlags(f *flag.FlagSet) *app {
	a := &app{}
	f.StringVar(&a.socket, "socket", "", "Workload API, as in unix:///run/payments/api.sock (default $SPIFFE_ENDPOINT_SOCKET)")
	f.StringVar(&a.vault, "vault", "http://127.0.0.1:8200", "`URL` of the secret store")
	f.StringVar(&a.audience, "audience", "vault", "audience of the JWT-SVID: the role's bound_audiences")
	f.StringVar(&a.role, "role", "payments", "role to log in with")
	f.StringVar(&a.path, "path", "secret/data/payments/db", "secret to read")
	return a
}

// password logs in by identity and reads the secret's field "password".
func (a *app) password(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	svid, err := a.identity(ctx)
	if err != nil {
		return "", fmt.Errorf("fetching a JWT-SVID: %w", err)
	}
	var login struct {
		Auth struct {
			Token string `json:"client_token"`
		} `json:"auth"`
	}
	if err := a.call(ctx, http.MethodPost, "auth/jwt/login", "", map[string]string{"role": a.role, "jwt": svid.Marshal()}, &login); err != nil {
		return "", fmt.Errorf("logging in as %s: %w", svid.ID, err)
	}
	var secret struct {
		Data struct {
			Data struct {
				Password string `json:"password"`
			} `json:"data"`
		} `json:"data"`
	}
	if err := a.call(ctx, http.MethodGet, a.path, login.Auth.Token, nil, &secret); err != nil {
		return "", fmt.Errorf("reading %s: %w", a.path, err)
	}
	if secret.Data.Data.Password == "" {
		return "", fmt.Errorf("reading %s: it has no password", a.path)
	}
	return secret.Data.Data.Password, nil
}

// identity fetches a JWT-SVID, as soon as there is one: a sidecar that has just
// started answers Unavailable.
func (a *app) identity(ctx context.Context) (*jwtsvid.SVID, error) {
	var opts []workloadapi.ClientOption
	if a.socket != "" {
		opts = append(opts, workloadapi.WithAddr(a.socket))
	}
	for {
		svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: a.audience}, opts...)
		if status.Code(err) != codes.Unavailable {
			return svid, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// call is one request of Vault's HTTP API.
func (a *app) call(ctx context.Context, method, path, token string, in, out any) error {
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(a.vault, "/")+"/v1/"+path, &body)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("X-Vault-Token", token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		var problem struct{ Errors []string }
		if json.Unmarshal(data, &problem) != nil || len(problem.Errors) == 0 {
			problem.Errors = []string{resp.Status}
		}
		return errors.New(strings.Join(problem.Errors, "; "))
	}
	return json.Unmarshal(data, out)
}
