package gcpiit

import (
	"context"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"

	"github.com/signet-id/signet/internal/durable"
)

const (
	maxKeysBytes = 256 << 10
	maxKeys      = 64
	minKeyBits   = 2048

	fetchTimeout = 5 * time.Second
	// Keys are fetched again when the answer's max-age has passed, but never more often than minFresh allows, and at the
	// latest after maxFresh. While they cannot be fetched, old ones are good until maxStale.
	minFresh = 5 * time.Minute
	maxFresh = 12 * time.Hour
	maxStale = 24 * time.Hour
	// minBetween is the least time between two fetches, whatever key IDs strangers make up.
	minBetween = 10 * time.Second
)

// errUnknownKey says that there are keys, and none of that ID.
var errUnknownKey = errors.New("no key of that ID")

// A keySource knows the keys that sign identity tokens. It is safe for concurrent use.
type keySource interface {
	// key returns the key of an ID, or errUnknownKey.
	key(ctx context.Context, kid string) (*rsa.PublicKey, error)
}

// parseKeys reads a JWK Set or, as Google also publishes them, certificates in PEM form by key ID. One key that cannot be
// Google's spoils them all, but for keys of a JWK Set that say themselves that they are for something else.
func parseKeys(data []byte) (map[string]*rsa.PublicKey, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(data, &members); err != nil {
		return nil, errors.New("not a JSON object in which each member occurs once")
	}
	keys := map[string]*rsa.PublicKey{}
	add := func(kid string, key any) error {
		k, ok := key.(*rsa.PublicKey)
		switch {
		case kid == "":
			return errors.New("a key has no ID")
		case keys[kid] != nil:
			return fmt.Errorf("two keys have the ID %q", clip(kid))
		case len(keys) == maxKeys:
			return fmt.Errorf("there are more than %d keys", maxKeys)
		case !ok || k.N.BitLen() < minKeyBits:
			return fmt.Errorf("key %q is not an RSA public key of %d bits or more", clip(kid), minKeyBits)
		}
		keys[kid] = k
		return nil
	}
	if set, ok := members["keys"]; ok {
		var list []jose.JSONWebKey
		if err := json.Unmarshal(set, &list); err != nil {
			return nil, errors.New("not a JWK Set")
		}
		for _, k := range list {
			if k.Algorithm != "" && k.Algorithm != string(jose.RS256) || k.Use != "" && k.Use != "sig" {
				continue // for something else
			}
			if err := add(k.KeyID, k.Key); err != nil {
				return nil, err
			}
		}
	} else {
		for kid, raw := range members {
			var text string
			if err := json.Unmarshal(raw, &text); err != nil {
				return nil, errors.New("neither a JWK Set nor certificates by key ID")
			}
			block, _ := pem.Decode([]byte(text))
			if block == nil || block.Type != "CERTIFICATE" {
				return nil, fmt.Errorf("key %q is not a certificate in PEM form", clip(kid))
			}
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("key %q: %w", clip(kid), err)
			}
			if err := add(kid, c.PublicKey); err != nil {
				return nil, err
			}
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("there is no key in it")
	}
	return keys, nil
}

// A keyFile is the path of a file with keys.
type keyFile string

func (f keyFile) key(_ context.Context, kid string) (*rsa.PublicKey, error) {
	keys, err := f.read()
	if err != nil {
		return nil, err
	}
	if k := keys[kid]; k != nil {
		return k, nil
	}
	return nil, errUnknownKey
}

func (f keyFile) read() (map[string]*rsa.PublicKey, error) {
	data, err := durable.ReadFile(string(f), maxKeysBytes)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", string(f), err)
	}
	return keys, nil
}

// A keyURL fetches keys when they are needed and keeps them for as long as their server says, within bounds. It has no
// task of its own in the background.
type keyURL struct {
	url   string
	roots *x509.CertPool
	now   func() time.Time

	fetching chan struct{} // one slot: held by who fetches

	mu      sync.Mutex // guards what is below, and is never held while fetching
	keys    map[string]*rsa.PublicKey
	fetched time.Time
	fresh   time.Time // until when the keys need not be fetched again
	next    time.Time // before which nothing is fetched
	failure error     // of the last fetch, or nil
}

func newKeyURL(url, caFile string, now func() time.Time) (*keyURL, error) {
	u := &keyURL{url: url, now: now, fetching: make(chan struct{}, 1)}
	if caFile != "" {
		data, err := durable.ReadFile(caFile, maxKeysBytes)
		if err != nil {
			return nil, err
		}
		u.roots = x509.NewCertPool()
		if !u.roots.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("%s: holds no certificate in PEM form", caFile)
		}
	}
	return u, nil
}

func (u *keyURL) key(ctx context.Context, kid string) (*rsa.PublicKey, error) {
	k, again, err := u.look(kid)
	if !again {
		return k, err
	}
	select {
	case u.fetching <- struct{}{}:
		defer func() { <-u.fetching }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if k, again, err = u.look(kid); again { // nobody has fetched it meanwhile
		// A caller that goes away does not end the fetch, or strangers could see to it that none ever succeeds.
		u.fetch(context.WithoutCancel(ctx))
		k, _, err = u.look(kid)
	}
	return k, err
}

// look returns the key that is there, and whether it should be fetched first.
func (u *keyURL) look(kid string) (k *rsa.PublicKey, again bool, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.now()
	may := !now.Before(u.next) || now.Before(u.fetched) // the clock may have been set back
	stale := u.keys == nil || now.Sub(u.fetched) >= maxStale
	switch k := u.keys[kid]; {
	case stale:
		return nil, may, fmt.Errorf("keys of %s: %w", u.url, errors.Join(errors.New("not to be had"), u.failure))
	case k == nil:
		return nil, may, errUnknownKey
	default:
		return k, may && !now.Before(u.fresh), nil
	}
}

func (u *keyURL) fetch(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	keys, age, err := u.get(ctx)
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.now()
	u.next = now.Add(minBetween + rand.N(minBetween))
	if u.failure = err; err != nil {
		return
	}
	age = min(max(age, minFresh), maxFresh)
	u.keys, u.fetched, u.fresh = keys, now, now.Add(age-rand.N(age/5))
}

// get asks the server once. age is for how long it says that its answer is good.
func (u *keyURL) get(ctx context.Context) (keys map[string]*rsa.PublicKey, age time.Duration, err error) {
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: u.roots},
		ForceAttemptHTTP2:      true,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // so that maxKeysBytes is also what came over the wire
	}
	defer t.CloseIdleConnections()
	client := &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.url, nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = resp.Body.Close() }() // it was read, or is of no use
	if resp.StatusCode != http.StatusOK {
		return nil, 0, fmt.Errorf("the server answers with %d", resp.StatusCode)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxKeysBytes+1))
	if err != nil {
		return nil, 0, err
	}
	if len(data) > maxKeysBytes {
		return nil, 0, fmt.Errorf("the answer is larger than %d bytes", maxKeysBytes)
	}
	if keys, err = parseKeys(data); err != nil {
		return nil, 0, err
	}
	return keys, maxAge(resp.Header.Get("Cache-Control")), nil
}

// maxAge is the max-age of a Cache-Control header, or 0.
func maxAge(header string) time.Duration {
	for directive := range strings.SplitSeq(header, ",") {
		if v, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(directive)), "max-age="); ok {
			if n, err := strconv.ParseInt(v, 10, 32); err == nil && n > 0 {
				return time.Duration(n) * time.Second
			}
		}
	}
	return 0
}
