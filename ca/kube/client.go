// Package kube is how the CA reaches the Kubernetes clusters that it watches. The packages below it do the work: pods
// gives each pod its identities, watch brings the pods, resources and spireresources read custom resources, publish
// hands out the trust bundle, podcert signs Pod Certificates, and inject puts the proxy into pods. They are the only
// ones that know client-go, and none of them is linked into the agent.
package kube

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/flowcontrol"
)

// SignerName is the CA as a signer of the API certificates.k8s.io: of Pod Certificates, and of its ClusterTrustBundle.
const SignerName = "signet-id.github.io/x509-svid"

// Requests to one API server, all parts of the CA together.
const (
	requestsPerSecond = 50
	requestBurst      = 200
)

// A Client reaches one cluster. It is safe for concurrent use.
type Client struct {
	// Cluster is the name that the configuration gives the cluster, which its agents send when they attest.
	Cluster string
	// Dynamic knows any resource. Those of Kubernetes itself that the CA works with have methods of their own.
	Dynamic dynamic.Interface
	// Metadata knows the metadata of any resource, and nothing else of it.
	Metadata metadata.Interface

	apis  *apis
	guard *guard
}

// Requests returns how much was asked of the API server until now.
func (c *Client) Requests() Requests { return c.guard.requests() }

// Open makes a client from a kubeconfig file, or, without one, as a pod of the cluster does. It makes no request. The kubeconfig, and
// files that it names, are read again when they change.
func Open(cluster, kubeconfig string) (*Client, error) {
	t := &current{kubeconfig: kubeconfig}
	c, err := t.take()
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", cluster, err)
	}
	c.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(requestsPerSecond, requestBurst)
	g := &guard{next: t, timeout: requestTimeout, silence: watchSilence, limit: maxResponseBytes}
	// An API server does not redirect. Whoever it names would be sent requests of the CA, deletions too.
	h := &http.Client{Transport: g, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	client := &Client{Cluster: cluster, guard: g}
	if client.apis, err = newAPIs(c, h); err != nil {
		return nil, fmt.Errorf("cluster %s: %w", cluster, err)
	}
	if client.Dynamic, err = dynamic.NewForConfigAndClient(c, h); err != nil {
		return nil, fmt.Errorf("cluster %s: %w", cluster, err)
	}
	if client.Metadata, err = metadata.NewForConfigAndClient(c, h); err != nil {
		return nil, fmt.Errorf("cluster %s: %w", cluster, err)
	}
	return client, nil
}

// Close lets go of idle connections.
func (c *Client) Close() { utilnet.CloseIdleConnectionsFor(c.guard.next) }

func load(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		c, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, errors.New("kubeconfig: missing, and the CA does not run in a pod of the cluster; name a kubeconfig file")
		}
		return c, err
	}
	c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
	}
	switch {
	case c.ExecProvider != nil || c.AuthProvider != nil:
		return nil, fmt.Errorf("kubeconfig %s: programs for credentials (exec, auth-provider) are not run by a CA; use a token file or a client certificate", kubeconfig)
	case c.Insecure:
		return nil, fmt.Errorf("kubeconfig %s: insecure-skip-tls-verify is not supported; name the API server's authorities", kubeconfig)
	}
	switch server, _, err := rest.DefaultServerUrlFor(c); {
	case err != nil:
		return nil, fmt.Errorf("kubeconfig %s: server: %w", kubeconfig, err)
	case server.Scheme != "https" && !loopback(server.Hostname()):
		return nil, fmt.Errorf("kubeconfig %s: server: %q is not https; whoever is on the way would be the API server, and have the CA's credentials", kubeconfig, c.Host)
	}
	return c, nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
