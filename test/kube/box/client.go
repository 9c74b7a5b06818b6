package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// await asks again and again until ready succeeds.
func (n *node) await(what string, limit time.Duration, ready func() error) error {
	ctx, cancel := context.WithTimeout(n.ctx, limit)
	defer cancel()
	if err := again(ctx, 100*time.Millisecond, ready); err != nil {
		return fmt.Errorf("waited %v for %s: %w", limit, what, err)
	}
	return nil
}

// An apiClient asks the API server.
type apiClient struct {
	http http.Client
	addr string
}

func (n *node) client(user string) (*apiClient, error) {
	key := func(name string) string { return filepath.Join(n.dir, "pki", name) }
	cert, err := tls.LoadX509KeyPair(key(user+".crt"), key(user+".key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(key("ca.crt"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &apiClient{addr: n.at.api, http: http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}},
	}}, nil
}

func (c *apiClient) get(path string) ([]byte, error) {
	resp, err := c.http.Get("https://" + c.addr + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", path, resp.Status)
	}
	return b, err
}

func (c *apiClient) ok(path string) error {
	_, err := c.get(path)
	return err
}

// nodeReady reports whether a Node object says that it is ready.
func nodeReady(object []byte) bool {
	var v struct {
		Status struct {
			Conditions []struct{ Type, Status string }
		}
	}
	if json.Unmarshal(object, &v) != nil {
		return false
	}
	for _, c := range v.Status.Conditions {
		if c.Type == "Ready" {
			return c.Status == "True"
		}
	}
	return false
}
