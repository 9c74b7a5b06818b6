// Package k8spsat judges agents that run in Kubernetes: by the projected service account token of their pod, which the
// cluster's own API server reviews, and by the node that the API server says the pod is on. It is SPIRE's attestor
// k8s_psat, for several clusters. It believes nothing of the token that the API server has not said about it.
package k8spsat

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4/json"

	"github.com/signet-id/signet/ca/nodeattest"
)

// Type is the attestor's name.
const Type = "k8s_psat"

const (
	// MaxTokenBytes bounds the token. The API server's own are below 2 KiB.
	MaxTokenBytes = 16 << 10
	// maxAtOnce bounds the reviews of one cluster that are under way, so that a flood of strangers is no flood at its API
	// server; maxQueue is how long one more waits for its turn.
	maxAtOnce = 16
	maxQueue  = 5 * time.Second
	// maxJudging bounds one attestation with all its retries. Agents wait for 30 seconds.
	maxJudging = 20 * time.Second
)

// An Attestor judges tokens of the configured clusters.
type Attestor struct {
	clusters map[string]*cluster
}

type cluster struct {
	name            string
	serviceAccounts map[string]bool
	audiences       []string
	nodeLabels      map[string]bool
	podLabels       map[string]bool
	usePodUID       bool

	access access
	slots  chan struct{}
}

// New returns the attestor of a configuration that Check accepts. It reads the files that the configuration names, so
// that a mistake is found at the start, and again for each attestation, so that credentials may rotate.
func New(c Config) (*Attestor, error) {
	a := &Attestor{clusters: map[string]*cluster{}}
	var errs []error
	for name, config := range c.Clusters {
		k := &cluster{
			name: name, serviceAccounts: set(config.ServiceAccounts), audiences: config.Audiences,
			nodeLabels: set(config.NodeLabels), podLabels: set(config.PodLabels), usePodUID: config.UsePodUID,
			access: inCluster{c.ServiceAccountDir}, slots: make(chan struct{}, maxAtOnce),
		}
		if len(k.audiences) == 0 {
			k.audiences = []string{DefaultAudience}
		}
		if config.Kubeconfig != "" {
			k.access = kubeconfig(config.Kubeconfig)
		}
		if _, err := k.access.load(); err != nil {
			errs = append(errs, fmt.Errorf("clusters.%s: %w", name, err))
		}
		a.clusters[name] = k
	}
	return a, errors.Join(errs...)
}

func set(values []string) map[string]bool {
	m := make(map[string]bool, len(values))
	for _, v := range values {
		m[v] = true
	}
	return m
}

// Type is SPIRE's name of this attestor.
func (a *Attestor) Type() string { return Type }

// Attest judges a payload {"cluster": ..., "token": ...}. [SPIRE-PROTOCOL §3.3]
func (a *Attestor) Attest(ctx context.Context, attempt nodeattest.Attempt) (*nodeattest.Evidence, error) {
	name, token, err := parsePayload(attempt.Payload)
	if err != nil {
		return nil, err
	}
	k := a.clusters[name]
	if k == nil {
		return nil, nodeattest.Refuse(nodeattest.Malformed, "not configured for cluster %q", clip(name))
	}
	ctx, cancel := context.WithTimeout(ctx, maxJudging)
	defer cancel()
	if err := k.enter(ctx); err != nil {
		return nil, err
	}
	defer k.leave()
	return k.judge(ctx, token)
}

// parsePayload reads what the agent sends. Names are compared exactly and none may occur twice, so that no two readers
// see two tokens. The error never repeats the token.
func parsePayload(payload []byte) (cluster, token string, err error) {
	var p struct {
		Cluster string `json:"cluster"`
		Token   string `json:"token"`
	}
	if err := json.Unmarshal(payload, &p); err != nil {
		return "", "", nodeattest.Refuse(nodeattest.Malformed, `the payload is not a JSON object with the members "cluster" and "token", each once`)
	}
	switch {
	case p.Cluster == "":
		return "", "", nodeattest.Refuse(nodeattest.Malformed, "missing cluster in attestation data")
	case p.Token == "":
		return "", "", nodeattest.Refuse(nodeattest.Malformed, "missing token in attestation data")
	case len(p.Token) > MaxTokenBytes:
		return "", "", nodeattest.Refuse(nodeattest.Malformed, "the token has %d bytes, at most %d are allowed", len(p.Token), MaxTokenBytes)
	case !isJWS(p.Token):
		return "", "", nodeattest.Refuse(nodeattest.Malformed, "the token is not a JWT, as service account tokens are; does the agent's token_path name the right file?")
	}
	return p.Cluster, p.Token, nil
}

// isJWS says whether s has the form of a signed JWT. It is no judgement on it.
func isJWS(s string) bool {
	parts := strings.Split(s, ".")
	if len(parts) != 3 {
		return false
	}
	for _, p := range parts {
		if p == "" || strings.ContainsFunc(p, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_')
		}) {
			return false
		}
	}
	return true
}

func (k *cluster) enter(ctx context.Context) error {
	timer := time.NewTimer(maxQueue)
	defer timer.Stop()
	select {
	case k.slots <- struct{}{}:
		return nil
	case <-timer.C:
		return nodeattest.Refuse(nodeattest.Unavailable, "too many nodes of cluster %q attest at once; attest again", k.name)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (k *cluster) leave() { <-k.slots }

// judge asks the API server three things: who the token is for, where its pod is, and which node that is.
func (k *cluster) judge(ctx context.Context, token string) (*nodeattest.Evidence, error) {
	denied := func(format string, args ...any) error { return nodeattest.Refuse(nodeattest.Denied, format, args...) }
	cannot := func(doing string, err error) error {
		return nodeattest.Refuse(nodeattest.Internal, "unable to %s with the API of cluster %q", doing, k.name).Because(err)
	}

	credentials, err := k.access.load()
	if err != nil {
		return nil, cannot("validate the token", err)
	}
	s := open(credentials)
	defer s.close()

	review, err := s.review(ctx, token, k.audiences)
	if err != nil {
		return nil, cannot("validate the token", err)
	}
	if !review.Authenticated {
		return nil, nodeattest.Refuse(nodeattest.Denied, "token not authenticated according to TokenReview API for cluster %q", k.name).Because(review.why(token))
	}
	if !intersect(review.Audiences, k.audiences) {
		return nil, denied("the token is for none of the audiences of cluster %q", k.name)
	}
	who, err := review.holder()
	if err != nil {
		return nil, nodeattest.Refuse(nodeattest.Denied, "the token is not one of a service account that is bound to a pod in cluster %q", k.name).Because(err)
	}
	if account := who.namespace + ":" + who.serviceAccount; !k.serviceAccounts[account] {
		return nil, denied("%q is not an allowed service account for cluster %q", clip(account), k.name)
	}

	pod, err := s.pod(ctx, who.namespace, who.podName)
	if errors.Is(err, errNotFound) {
		return nil, denied("the pod that the token is bound to does not exist in cluster %q", k.name)
	}
	if err != nil {
		return nil, cannot("get the pod", err)
	}
	switch {
	case pod.Metadata.UID != who.podUID:
		return nil, denied("pod UID mismatch: the token is bound to another pod of the same name in cluster %q", k.name)
	case pod.Metadata.Name != who.podName || pod.Metadata.Namespace != who.namespace:
		return nil, cannot("get the pod", fmt.Errorf("asked for pod %q in namespace %q, it answered with %q in %q", who.podName, who.namespace, pod.Metadata.Name, pod.Metadata.Namespace))
	case pod.Spec.ServiceAccountName != who.serviceAccount:
		return nil, denied("the pod does not run as the token's service account in cluster %q", k.name)
	case pod.Status.Phase == "Succeeded" || pod.Status.Phase == "Failed":
		return nil, denied("the pod that the token is bound to has ended in cluster %q", k.name)
	case pod.Spec.NodeName == "" || pod.Status.HostIP == "":
		return nil, cannot("get the pod", errors.New("the API server does not yet say which node, with which IP address, the pod runs on"))
	case who.nodeName != "" && who.nodeName != pod.Spec.NodeName:
		return nil, denied("the token was issued for a pod on another node of cluster %q", k.name)
	}

	node, err := s.node(ctx, pod.Spec.NodeName)
	switch {
	case err != nil:
		return nil, cannot("get the node", err)
	case node.Metadata.Name != pod.Spec.NodeName:
		return nil, cannot("get the node", fmt.Errorf("asked for node %q, it answered with %q", pod.Spec.NodeName, node.Metadata.Name))
	case !isUID(node.Metadata.UID) || !isUID(who.podUID):
		return nil, cannot("get the node", errors.New("the UID of the node or of the pod is missing or cannot stand in a SPIFFE ID"))
	case who.nodeUID != "" && who.nodeUID != node.Metadata.UID:
		return nil, denied("the token was issued for a pod on an earlier node of the same name of cluster %q", k.name)
	}
	return k.evidence(who, pod, node), nil
}

func (k *cluster) evidence(who *holder, pod *pod, node *node) *nodeattest.Evidence {
	path := []string{Type, k.name, node.Metadata.UID}
	if k.usePodUID {
		path = []string{Type, k.name, "pod", who.podUID}
	}
	selectors := []string{
		"cluster:" + k.name,
		"agent_ns:" + who.namespace,
		"agent_sa:" + who.serviceAccount,
		"agent_pod_name:" + who.podName,
		"agent_pod_uid:" + who.podUID,
		"agent_node_ip:" + pod.Status.HostIP,
		"agent_node_name:" + pod.Spec.NodeName,
		"agent_node_uid:" + node.Metadata.UID,
	}
	selectors = append(selectors, labels("agent_node_label", node.Metadata.Labels, k.nodeLabels)...)
	selectors = append(selectors, labels("agent_pod_label", pod.Metadata.Labels, k.podLabels)...)
	facts := map[string]any{"cluster": k.name, "pod": who.namespace + "/" + who.podName, "pod_uid": who.podUID, "node": pod.Spec.NodeName}
	if who.credential != "" {
		facts["credential_id"] = clip(who.credential) // which the cluster's own audit log has, too
	}
	return &nodeattest.Evidence{Path: path, Selectors: selectors, CanReattest: true, Facts: facts}
}

func labels(kind string, have map[string]string, allowed map[string]bool) []string {
	var values []string
	for _, key := range slices.Sorted(maps.Keys(have)) {
		if allowed[key] {
			values = append(values, kind+":"+key+":"+have[key])
		}
	}
	return values
}

func intersect(a, b []string) bool {
	return slices.ContainsFunc(a, func(s string) bool { return slices.Contains(b, s) })
}

// clip keeps foreign text in messages short.
func clip(s string) string {
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "..."
	}
	return s
}
