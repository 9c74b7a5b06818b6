package upstream

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

const (
	maxSecretBytes  = 16 << 10
	maxKeyFileBytes = 64 << 10 // of the key that the TLS client shows itself with; authorities' keys are in package keys
)

// A secret prints as "[secret]" with every verb.
type secret string

func (secret) Format(f fmt.State, _ rune) { io.WriteString(f, "[secret]") }

// Login says how this CA comes by a token of Vault. Exactly one of its ways is set. Files are read anew each time.
type Login struct {
	// TokenFile holds a token, which something else renews or exchanges, or which this CA renews if it can be.
	TokenFile string

	// AppRole: RoleID and SecretIDFile.
	RoleID       string
	SecretIDFile string

	// Kubernetes: Role and the file of a service account token.
	KubernetesRole      string
	KubernetesTokenFile string

	// TLS certificate: the files of certificate and key, and the role's name (empty: any that fits).
	CertificateFile, KeyFile string
	CertificateRole          string

	// Mount is the path of the auth method. Empty means approle, kubernetes or cert.
	Mount string
}

// Check refuses a Login that is not exactly one way.
func (l Login) Check() error {
	ways := 0
	for _, set := range []bool{l.TokenFile != "", l.RoleID != "" || l.SecretIDFile != "", l.KubernetesRole != "", l.CertificateFile != "" || l.KeyFile != ""} {
		if set {
			ways++
		}
	}
	switch {
	case ways == 0:
		return errors.New("no way to log in; set token_file, app_role, kubernetes or cert")
	case ways > 1:
		return errors.New("several ways to log in; set one of token_file, app_role, kubernetes and cert")
	case (l.RoleID == "") != (l.SecretIDFile == ""):
		return errors.New("app_role needs role_id and secret_id_file")
	case (l.CertificateFile == "") != (l.KeyFile == ""):
		return errors.New("cert needs certificate_file and key_file")
	}
	return nil
}

// clientCertificate makes the TLS client show the certificate of a cert login.
func (l Login) clientCertificate(c *tls.Config) {
	if l.CertificateFile == "" {
		return
	}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := readFile(l.CertificateFile, maxPEMBytes)
		if err != nil {
			return nil, fmt.Errorf("certificate_file: %w", err)
		}
		key, err := readSecret(l.KeyFile, maxKeyFileBytes)
		if err != nil {
			return nil, fmt.Errorf("key_file: %w", err)
		}
		defer clear(key)
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, errors.New("certificate_file and key_file are not a pair")
		}
		return &pair, nil
	}
}

// A token is what the server gave, and when it must be renewed.
type token struct {
	value     secret
	renewable bool
	lease     time.Duration // 0: for ever
	got       time.Time
}

// Format hides the token: fmt prints what is inside a struct as it is, whatever methods it has.
func (token) Format(f fmt.State, _ rune) { io.WriteString(f, "[token]") }

func (t token) due(now time.Time) bool { return t.lease > 0 && now.Sub(t.got) >= t.lease/2 }
func (t token) over(now time.Time) bool {
	return t.value == "" || t.lease > 0 && now.Sub(t.got) >= t.lease
}

type authAnswer struct {
	Auth struct {
		ClientToken   string `json:"client_token"`
		LeaseDuration int64  `json:"lease_duration"` // seconds
		Renewable     bool   `json:"renewable"`
	} `json:"auth"`
	Data struct { // of lookup-self
		TTL       int64 `json:"ttl"`
		Renewable bool  `json:"renewable"`
	} `json:"data"`
}

// lease converts a number of seconds. What is absurd is taken for a day, so that it is asked about again.
func lease(seconds int64) time.Duration {
	const day = 24 * 60 * 60
	if seconds < 0 || seconds > 1000*day {
		seconds = day
	}
	return time.Duration(seconds) * time.Second
}

// authorized makes a call with the token. If the server does not take the token, it is got anew, once.
func (v *Vault) authorized(ctx context.Context, method, path string, request, answer any) error {
	fresh := v.token.over(v.c.Now())
	for {
		if err := v.keepToken(ctx); err != nil {
			return err
		}
		err := v.call(ctx, method, path, request, v.token.value, answer)
		var refused *vaultError
		if !errors.As(err, &refused) || refused.code != http.StatusForbidden || fresh {
			return err
		}
		v.token, fresh = token{}, true
	}
}

// keepToken sees to it that there is a token: renewed at half of its life, got anew if that fails or there is none.
func (v *Vault) keepToken(ctx context.Context) error {
	now := v.c.Now()
	if v.c.Login.TokenFile != "" { // it may have been exchanged
		text, err := readToken(v.c.Login.TokenFile)
		if err != nil {
			return fmt.Errorf("token_file: %w", err)
		}
		if text != v.token.value {
			v.token = token{}
		}
	}
	switch {
	case v.token.over(now):
		return v.login(ctx)
	case !v.token.due(now) || !v.token.renewable:
		return nil
	}
	var answer authAnswer
	if err := v.call(ctx, http.MethodPost, "auth/token/renew-self", map[string]any{}, v.token.value, &answer); err != nil {
		if v.c.Login.TokenFile != "" {
			return fmt.Errorf("renewing the token of token_file: %w", err)
		}
		return v.login(ctx)
	}
	v.token.lease, v.token.renewable, v.token.got = lease(answer.Auth.LeaseDuration), answer.Auth.Renewable, now
	return nil
}

func readToken(path string) (secret, error) {
	text, err := readSecret(path, maxSecretBytes)
	if err != nil {
		return "", err
	}
	text = bytes.TrimSpace(text)
	if len(text) == 0 || bytes.ContainsFunc(text, func(r rune) bool { return r < 0x21 || r > 0x7e }) {
		return "", fmt.Errorf("%s does not hold a token: it must be one line of printable characters", path)
	}
	return secret(text), nil
}

func (v *Vault) login(ctx context.Context) error {
	l, now := v.c.Login, v.c.Now()
	var answer authAnswer
	if l.TokenFile != "" {
		value, err := readToken(l.TokenFile)
		if err != nil {
			return fmt.Errorf("token_file: %w", err)
		}
		if err := v.call(ctx, http.MethodGet, "auth/token/lookup-self", nil, value, &answer); err != nil {
			return fmt.Errorf("the token of token_file: %w", err)
		}
		v.token = token{value: value, renewable: answer.Data.Renewable, lease: lease(answer.Data.TTL), got: now}
		return nil
	}
	mount, request := l.Mount, map[string]any{}
	or := func(standard string) {
		if mount == "" {
			mount = standard
		}
	}
	switch {
	case l.RoleID != "":
		or("approle")
		id, err := readToken(l.SecretIDFile)
		if err != nil {
			return fmt.Errorf("secret_id_file: %w", err)
		}
		request["role_id"], request["secret_id"] = l.RoleID, string(id)
	case l.KubernetesRole != "":
		or("kubernetes")
		jwt, err := readToken(l.KubernetesTokenFile)
		if err != nil {
			return fmt.Errorf("the service account's token: %w", err)
		}
		request["role"], request["jwt"] = l.KubernetesRole, string(jwt)
	default:
		or("cert")
		if l.CertificateRole != "" {
			request["name"] = l.CertificateRole
		}
	}
	if err := v.call(ctx, http.MethodPost, "auth/"+mount+"/login", request, "", &answer); err != nil {
		return fmt.Errorf("logging in: %w", err)
	}
	if answer.Auth.ClientToken == "" || len(answer.Auth.ClientToken) > maxSecretBytes {
		return errors.New("logging in: the answer holds no token")
	}
	v.token = token{value: secret(answer.Auth.ClientToken), renewable: answer.Auth.Renewable, lease: lease(answer.Auth.LeaseDuration), got: now}
	return nil
}
