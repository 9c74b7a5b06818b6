package k8spsat

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/signet-id/signet/internal/durable"
)

// An access says how to reach a cluster's API server. It is asked anew for each attestation: tokens and certificates
// rotate. It is safe for concurrent use.
type access interface {
	load() (*credentials, error)
}

// credentials reach one API server, which is always verified.
type credentials struct {
	server       string // https://host:port, without a slash at the end
	serverName   string // that is verified instead of the host, or empty
	roots        *x509.CertPool
	certificates []tls.Certificate
	token        string // secret
}

// Format prints nothing of the credentials, whatever the verb.
func (c *credentials) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[credentials]") }

const (
	maxCredentialBytes = 1 << 20
	serviceAccountDir  = "/var/run/secrets/kubernetes.io/serviceaccount"
)

// inCluster is how a pod of the cluster reaches it: through the environment and files that Kubernetes gives each pod.
type inCluster struct{ dir string }

func (i inCluster) load() (*credentials, error) {
	dir := i.dir
	if dir == "" {
		dir = serviceAccountDir
	}
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("kubeconfig: missing, and the CA does not run in a pod of the cluster, since KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set; name a kubeconfig file")
	}
	token, err := readToken(filepath.Join(dir, "token"))
	if err != nil {
		return nil, err
	}
	ca, err := durable.ReadFile(filepath.Join(dir, "ca.crt"), maxCredentialBytes)
	if err != nil {
		return nil, err
	}
	roots, err := parseRoots(ca)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, "ca.crt"), err)
	}
	return &credentials{server: "https://" + net.JoinHostPort(host, port), roots: roots, token: token}, nil
}

func readToken(path string) (string, error) {
	data, err := durable.ReadFile(path, maxCredentialBytes)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if err := checkToken(token); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return token, nil
}

// checkToken sees to it that a token can stand in a header. Its error never repeats it.
func checkToken(token string) error {
	if token == "" {
		return errors.New("holds no token")
	}
	if len(token) > MaxTokenBytes || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("is not a bearer token: it is longer than %d bytes, or has characters that cannot be sent", MaxTokenBytes)
	}
	return nil
}

func parseRoots(text []byte) (*x509.CertPool, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, errors.New("holds no certificate in PEM form")
	}
	return roots, nil
}

// parseServer reads the URL of an API server.
func parseServer(s string) (string, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "":
		return "", fmt.Errorf("server: %q is not a URL, such as https://10.0.0.1:6443", s)
	case u.Scheme != "https":
		return "", fmt.Errorf("server: %q is not https; tokens are not sent in clear", s)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return "", errors.New("server: the URL has a user, a query or a fragment, which is not supported")
	}
	return strings.TrimSuffix(u.String(), "/"), nil
}

// fileOrData returns what a pair of kubeconfig fields holds: the name of a file, relative to dir, or base64.
func fileOrData(dir, field, file, data string) ([]byte, error) {
	switch {
	case data != "":
		decoded, err := base64.StdEncoding.DecodeString(data)
		if err != nil {
			return nil, fmt.Errorf("%s-data: not base64", field)
		}
		return decoded, nil
	case file != "":
		if !filepath.IsAbs(file) {
			file = filepath.Join(dir, file)
		}
		content, err := durable.ReadFile(file, maxCredentialBytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
		return content, nil
	}
	return nil, nil
}

func keyPair(cert, key []byte) ([]tls.Certificate, error) {
	if len(cert) == 0 && len(key) == 0 {
		return nil, nil
	}
	pair, err := tls.X509KeyPair(cert, bytes.TrimSpace(key))
	if err != nil {
		return nil, errors.New("client-certificate and client-key: not a certificate and its key, both in PEM form")
	}
	return []tls.Certificate{pair}, nil
}
