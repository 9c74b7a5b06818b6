// Package kube is how the CA reaches the Kubernetes clusters that it watches. The packages below it do the work: pods
// gives each pod its identities, watch brings the pods, resources and spireresources read custom resources, publish
// hands out the trust bundle, podcert signs Pod Certificates, and inject puts the proxy into pods. They are the only
// ones that know client-go, and none of them is linked into the agent.
package kube

import (
	"errors"
	"fmt"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/signet-id/signet/internal/version"
)

// Requests to one API server, all parts of the CA together.
const (
	requestsPerSecond = 50
	requestBurst      = 200
	requestTimeout    = 30 * time.Second
)

// A Client reaches one cluster. It is safe for concurrent use.
type Client struct {
	// Cluster is the name that the configuration gives the cluster, which its agents send when they attest.
	Cluster string
	// Typed knows the API of Kubernetes itself, Dynamic any resource.
	Typed   kubernetes.Interface
	Dynamic dynamic.Interface
}

// Open makes a client from a kubeconfig file, or, without one, as a pod of the cluster does. It makes no request.
// Tokens and certificates that are files are read again when they change.
func Open(cluster, kubeconfig string) (*Client, error) {
	c, err := load(kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", cluster, err)
	}
	c.UserAgent = "signet-ca/" + version.String()
	c.QPS, c.Burst, c.Timeout = requestsPerSecond, requestBurst, requestTimeout
	typed, err := kubernetes.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", cluster, err)
	}
	dyn, err := dynamic.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", cluster, err)
	}
	return &Client{Cluster: cluster, Typed: typed, Dynamic: dyn}, nil
}

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
	return c, nil
}
