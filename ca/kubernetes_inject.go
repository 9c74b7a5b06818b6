package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"path"
	"regexp"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/kube/inject"
)

// Injection puts `signet proxy` into pods with the label signet-id.github.io/inject: "true", by an admission webhook.
type Injection struct {
	// Listen is where API servers reach the webhook, such as :9443. Needed.
	Listen string `yaml:"listen"`
	// Service is the Service by which they reach it, in the CA's namespace. Default signet-inject.
	Service string `yaml:"service"`
	// DNSNames are further names of the webhook, for API servers that reach it by a URL. Default none.
	DNSNames []string `yaml:"dns_names"`
	// Webhook is the name of the MutatingWebhookConfiguration, whose caBundle the CA keeps. Default signet-inject.
	Webhook string `yaml:"webhook"`
	// Image is the proxy's image. Needed.
	Image string `yaml:"image"`
	// Volume is how pods reach the agent's socket unless they say otherwise: hostPath (default) or csi (csi.spiffe.io).
	Volume string `yaml:"volume"`
	// HostPath is the directory of the agent's socket on nodes. Default /run/signet/agent.
	HostPath string `yaml:"host_path"`
	// SocketName is the name of the socket in it, and in the volume of the CSI driver. Default agent.sock.
	SocketName string `yaml:"socket_name"`
}

const injectName = "signet-inject"

// socketName is what a socket may be called: it goes into the proxy's configuration.
var socketName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$`)

// checkInjection fills in defaults.
func (c *Config) checkInjection(bad func(field, format string, args ...any)) {
	for name, k := range c.Kubernetes.Clusters {
		i, field := k.Injection, "kubernetes.clusters."+name+".injection"
		if i == nil {
			continue
		}
		for _, f := range []struct {
			value     *string
			otherwise string
		}{{&i.Service, injectName}, {&i.Webhook, injectName}, {&i.Volume, "hostPath"}, {&i.HostPath, "/run/signet/agent"}, {&i.SocketName, inject.DefaultSocketName}} {
			if *f.value == "" {
				*f.value = f.otherwise
			}
		}
		if i.Listen == "" {
			bad(field+".listen", "missing; say where API servers reach the webhook, such as :9443")
		}
		if i.Image == "" || strings.ContainsAny(i.Image, " \t\n") {
			bad(field+".image", "%q is not an image; name that of signet-proxy", i.Image)
		}
		if i.Volume != "hostPath" && i.Volume != "csi" {
			bad(field+".volume", "%q is neither hostPath nor csi", i.Volume)
		}
		if !path.IsAbs(i.HostPath) {
			bad(field+".host_path", "%q must be absolute", i.HostPath)
		}
		if !socketName.MatchString(i.SocketName) {
			bad(field+".socket_name", "%q is not a file's name of letters, digits, \".\", \"-\" and \"_\"", i.SocketName)
		}
		for n, d := range i.DNSNames {
			if err := authority.CheckDNSName(d); err != nil {
				bad(fmt.Sprintf("%s.dns_names[%d]", field, n), "%v", err)
			}
		}
	}
}

// injectProxies makes the CA the admission webhook of the cluster, if the configuration says so.
func (ca *CA) injectProxies(c KubernetesCluster, k *kubeCluster) error {
	i := c.Injection
	if i == nil {
		return nil
	}
	cluster := k.client.Cluster
	names := append([]string{i.Service + "." + k.namespace + ".svc"}, i.DNSNames...)
	s, err := inject.New(inject.Config{Options: inject.Options{TrustDomain: ca.td, Image: i.Image, Volume: i.Volume, HostPath: i.HostPath, SocketName: i.SocketName},
		Cluster: cluster, Configurations: k.client.MutatingWebhookConfigurations(), Namespace: k.namespace, Webhook: i.Webhook, Listen: i.Listen,
		Sign: func(ctx context.Context, key crypto.PublicKey) (*authority.X509SVID, error) {
			return ca.signWebhook(ctx, cluster, names, key)
		},
		Active: ca.set.Pin, Roots: ca.roots, Now: ca.c.Now, Log: ca.log})
	if err != nil {
		return fmt.Errorf("kubernetes.clusters.%s.injection: %w", cluster, err)
	}
	ca.injectors = append(ca.injectors, s)
	k.injector = s
	k.parts = append(k.parts, s.Run)
	k.leading = append(k.leading, s.Lead)
	return nil
}

// roots are the X.509 authorities of the bundle.
func (ca *CA) roots() []*x509.Certificate {
	var out []*x509.Certificate
	for _, a := range ca.set.Bundle().X509 {
		out = append(out, a.Certificate)
	}
	return out
}

// signWebhook signs the X509-SVID of the admission webhook. It has an ID of its own, not the CA's: who had it could pose
// as the webhook, and as nothing else.
func (ca *CA) signWebhook(ctx context.Context, cluster string, names []string, key crypto.PublicKey) (*authority.X509SVID, error) {
	id, err := spiffeid.FromPath(ca.td, "/spire/signet/webhook/"+cluster)
	if err != nil {
		return nil, err
	}
	prepared, err := ca.set.CheckX509(authority.X509Request{ID: id, PublicKey: key, DNSNames: names, Reserved: true})
	if err != nil {
		return nil, err
	}
	svid, err := ca.set.SignX509(ctx, prepared)
	if err != nil {
		return nil, err
	}
	return svid, ca.audit.Append(ctx, auditlog.Essential, auditlog.Record{Time: ca.c.Now(), Event: "x509svid.issued", Actor: ca.svid.id.String(), ActorKind: "system",
		Subject: id.String(), Outcome: auditlog.Done, Details: map[string]any{"serial": svid.SerialNumber, "not_after": svid.NotAfter.Unix(), "authority": svid.AuthorityID, "by": "admission_webhook", "cluster": cluster}})
}
