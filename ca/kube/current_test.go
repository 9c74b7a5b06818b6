package kube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// identity makes the certificate of an API server, which is its own authority.
func identity(t *testing.T) (*tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// secured is an API server with one certificate at a time, which has no nodes for anybody but who shows the token.
func secured(t *testing.T, shown *atomic.Pointer[tls.Certificate], token string) string {
	t.Helper()
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Connection", "close") // each request proves it anew
		if r.Header.Get("Authorization") != "Bearer "+token {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprint(w, `{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"7"}}`)
	}))
	srv.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{*shown.Load()}}, nil
	}}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv.URL
}

func write(t *testing.T, path, text string) {
	t.Helper()
	next := path + ".next"
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
}

// An API server whose authorities rotate is reached by the file of them as it is now, and by a kubeconfig as it is now: without
// a restart of the CA, and with no request by what was revoked in between.
func TestFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	kubeconfig, authorities := filepath.Join(dir, "kubeconfig"), filepath.Join(dir, "ca.crt")
	text := func(url, authority, token string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{name: x, context: {cluster: x, user: x}}]\nusers: [{name: x, user: {token: %s}}]\nclusters: [{name: x, cluster: {server: %q, %s}}]\n", token, url, authority)
	}
	var shown, elsewhere atomic.Pointer[tls.Certificate]
	first, firstPEM := identity(t)
	shown.Store(first)
	url := secured(t, &shown, "one")
	write(t, authorities, string(firstPEM))
	write(t, kubeconfig, text(url, "certificate-authority: ca.crt", "one"))
	c, err := Open("prod", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	list := func() error {
		_, err := c.Nodes().List(t.Context(), metav1.ListOptions{})
		return err
	}
	if err := list(); err != nil {
		t.Fatal(err)
	}

	second, secondPEM := identity(t)
	shown.Store(second)
	if err := list(); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Fatalf("an API server that nothing vouches for: %v", err)
	}
	write(t, authorities, string(secondPEM))
	if err := list(); err != nil {
		t.Fatalf("the authorities are new, and the file has them: %v", err)
	}
	shown.Store(first)
	if err := list(); err == nil {
		t.Fatal("the authority that is gone still counts")
	}
	shown.Store(second)

	// What is half written, or wrong, changes nothing.
	for _, broken := range []string{"", "kind: Config\nclusters: [", strings.Replace(text(url, "certificate-authority: ca.crt", "one"), "https:", "http:", 1) + "x"} {
		write(t, kubeconfig, broken)
		if err := list(); err != nil {
			t.Errorf("with %q for a kubeconfig: %v", broken, err)
		}
	}
	if err := os.Remove(authorities); err != nil {
		t.Fatal(err)
	}
	if err := list(); err != nil {
		t.Errorf("without the file: %v", err)
	}

	third, thirdPEM := identity(t)
	elsewhere.Store(third)
	write(t, kubeconfig, text(secured(t, &elsewhere, "two"), "certificate-authority-data: "+base64.StdEncoding.EncodeToString(thirdPEM), "two"))
	if err := list(); err != nil {
		t.Errorf("a kubeconfig for another address: %v", err)
	}
}
