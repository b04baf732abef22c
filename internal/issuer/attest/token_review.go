package attest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// tokenReviews asks an API server about tokens: kind TokenReview of
// authentication.k8s.io/v1.
type tokenReviews struct {
	caller    *caller
	url       string
	tokenFile string
}

func newTokenReviews(cfg TokenReviewConfig) (*tokenReviews, error) {
	if err := checkURL("tokenReview.server", cfg.Server); err != nil {
		return nil, err
	}
	if cfg.TokenFile == "" {
		return nil, errors.New("tokenReview.tokenFile is missing: the control plane's own token")
	}
	c, err := newCaller(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("tokenReview: %w", err)
	}
	return &tokenReviews{c, strings.TrimSuffix(cfg.Server, "/") + "/apis/authentication.k8s.io/v1/tokenreviews", cfg.TokenFile}, nil
}

// tokenReview is what is used of the kind.
type tokenReview struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Spec       tokenReviewSpec   `json:"spec"`
	Status     tokenReviewStatus `json:"status"`
}

type tokenReviewSpec struct {
	Token     string   `json:"token"`
	Audiences []string `json:"audiences"`
}

type tokenReviewStatus struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences"`
	Error         string   `json:"error"`
	User          struct {
		Username string              `json:"username"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
}

// ask returns whose the token is, as the API server says.
func (r *tokenReviews) ask(ctx context.Context, token, audience string) (account, error) {
	status, err := r.post(ctx, token, audience)
	if err != nil {
		return account{}, fmt.Errorf("%w: asking for a TokenReview: %w", ErrUnreachable, err)
	}
	switch {
	case !status.Authenticated && status.Error != "":
		return account{}, bad(fmt.Errorf("the API server refuses the token: %s", forPeople(withoutToken(status.Error, token))))
	case !status.Authenticated:
		return account{}, bad(errors.New("the API server refuses the token"))
	case !slices.Contains(status.Audiences, audience):
		// An API server that does not look at audiences leaves them out.
		return account{}, bad(fmt.Errorf("the API server does not say that the token is for the audience %q", audience))
	}
	who, err := accountOfUser(status.User.Username, status.User.Extra)
	if err != nil {
		return account{}, bad(err)
	}
	return who, nil
}

func (r *tokenReviews) post(ctx context.Context, token, audience string) (tokenReviewStatus, error) {
	own, err := readToken(r.tokenFile)
	if err != nil {
		return tokenReviewStatus{}, err
	}
	body, err := json.Marshal(tokenReview{
		APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview",
		Spec: tokenReviewSpec{Token: token, Audiences: []string{audience}},
	})
	if err != nil {
		return tokenReviewStatus{}, err // impossible: strings only
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.url, bytes.NewReader(body))
	if err != nil {
		return tokenReviewStatus{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Authorization", "Bearer "+own)
	answer, err := r.caller.ask(req, http.StatusCreated, http.StatusOK)
	if denied(err) {
		return tokenReviewStatus{}, fmt.Errorf("%w to the control plane's own token, which needs the ClusterRole system:auth-delegator", err)
	}
	if err != nil {
		return tokenReviewStatus{}, err
	}
	return parseTokenReview(answer)
}

func parseTokenReview(answer []byte) (tokenReviewStatus, error) {
	var got tokenReview
	if err := json.Unmarshal(answer, &got); err != nil || got.Kind != "TokenReview" {
		return tokenReviewStatus{}, errors.New("the answer is not a TokenReview")
	}
	return got.Status, nil
}

// withoutToken keeps a token out of logs, should an API server quote it.
func withoutToken(s, token string) string { return strings.ReplaceAll(s, token, "(the token)") }

// accountOfUser reads a user as the API server describes a service account.
func accountOfUser(username string, extra map[string][]string) (account, error) {
	namespace, name, ok := strings.Cut(strings.TrimPrefix(username, accountPrefix), ":")
	if !ok || !strings.HasPrefix(username, accountPrefix) {
		return account{}, fmt.Errorf("the token is of the user %s, not a service account's", forPeople(username))
	}
	who := account{namespace: namespace, name: name}
	for key, into := range map[string]*string{extraPodName: &who.pod, extraPodUID: &who.podUID, extraNodeName: &who.node} {
		switch values := extra[key]; len(values) {
		case 0:
		case 1:
			*into = values[0]
		default:
			return account{}, fmt.Errorf("the API server gives %d values for %s", len(values), key)
		}
	}
	return who, who.check()
}
