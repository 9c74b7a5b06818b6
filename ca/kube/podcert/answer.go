package podcert

import (
	"bytes"
	"context"
	"crypto"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
)

// answer signs or denies what a request asks for. tries is how often it was tried before. An error means that there is no
// answer yet; nobody has to hear of errLater.
func (s *Signer) answer(ctx context.Context, r *certificatesv1beta1.PodCertificateRequest, tries int) error {
	g, err := s.judge(r)
	if err == nil {
		return s.issue(ctx, r, g)
	}
	var d *denial
	if !errors.As(err, &d) {
		return err
	}
	if d.mayChange && (!s.c.Pods.IsSynced(s.c.Cluster) || tries < patientTries || s.c.Now().Sub(r.CreationTimestamp.Time) < patience) {
		return errLater
	}
	return s.deny(ctx, r, d)
}

// A grant is what a request gets.
type grant struct {
	pod    *pods.Pod
	agents []*registry.Node
	entry  *registry.Entry
	key    crypto.PublicKey
	ttl    time.Duration
}

// judge decides about a request by what the CA knows; it asks nobody. Its error is a *denial, or the CA's own trouble.
func (s *Signer) judge(r *certificatesv1beta1.PodCertificateRequest) (grant, error) {
	var g grant
	var err error
	if g.key, err = readKey(&r.Spec); err != nil {
		return g, err
	}
	want, err := s.wanted(r.Spec.UnverifiedUserAnnotations)
	if err != nil {
		return g, err
	}
	if g.pod, err = s.seen(r); err != nil {
		return g, err
	}
	if g.agents, err = s.notBanned(g.pod); err != nil {
		return g, err
	}
	if g.entry, err = s.choose(g.pod, g.agents, want); err != nil {
		return g, err
	}
	if _, _, err := s.terms(g); err != nil {
		return g, err
	}
	g.ttl, err = s.ttl(g.entry, &r.Spec)
	return g, err
}

// notBanned returns the agents of the pod's node, none of which is banned: what its kubelet gets, a stolen node gets.
func (s *Signer) notBanned(p *pods.Pod) ([]*registry.Node, error) {
	agents := s.c.Agents(p.NodeUID)
	for _, n := range agents {
		if n.Banned {
			return nil, deny(reasonBanned, "the agent of the node %q is banned (%s); `signet agent unban` lets the node in again", clip(p.NodeName), n.ID)
		}
	}
	return agents, nil
}

// terms returns how the serial number begins, by which what a node obtained is revoked, and when the validity may begin at
// the earliest. [docs/decisions/0026]
func (s *Signer) terms(g grant) (prefix []byte, notBefore time.Time, err error) {
	agent, err := s.agentID(g)
	if err != nil {
		return nil, time.Time{}, err
	}
	prefix = s.c.Registry.SerialPrefix(agent)
	notBefore, _, err = s.c.Registry.Terms(g.entry.SPIFFEID, prefix)
	var revoked *registry.RevokedError
	if errors.As(err, &revoked) {
		return nil, time.Time{}, deny(reasonRevoked, "%v", err)
	}
	return prefix, notBefore, err
}

// agentID is the agent with whose SVIDs those of its node's kubelet are revoked: the one that there is, or the one that there
// would be.
func (s *Signer) agentID(g grant) (spiffeid.ID, error) {
	if len(g.agents) > 0 {
		return g.agents[0].ID, nil
	}
	return spiffeid.FromPath(s.c.TrustDomain, "/spire/agent/k8s_psat/"+s.c.Cluster+"/"+g.pod.NodeUID)
}

// issue signs the SVID, logs it, and hands it to the API server. What is logged and then not taken by the API server, nobody has.
func (s *Signer) issue(ctx context.Context, r *certificatesv1beta1.PodCertificateRequest, g grant) error {
	prefix, notBefore, err := s.terms(g)
	if err != nil {
		return err
	}
	prepared, err := s.c.Authority.CheckX509(authority.X509Request{ID: g.entry.SPIFFEID, PublicKey: g.key, TTL: g.ttl, DNSNames: g.entry.DNSNames, SerialPrefix: prefix, NotBefore: notBefore})
	if err != nil {
		return err
	}
	svid, err := s.c.Authority.SignX509(ctx, prepared)
	if err != nil {
		return err
	}
	if lasts := svid.NotAfter.Sub(svid.NotBefore); lasts < MinLifetime {
		// After a revocation validity begins no earlier than it; soon there is room again.
		return fmt.Errorf("an SVID for %s would last %s, less than the hour that Kubernetes wants", g.entry.SPIFFEID, lasts)
	}
	err = s.c.Audit.Append(ctx, auditlog.Essential, auditlog.Record{Time: s.c.Now(), Event: "x509svid.issued", Actor: s.c.signer(), ActorKind: "system",
		Subject: g.entry.SPIFFEID.String(), Outcome: auditlog.Done, Details: map[string]any{"entry_id": string(g.entry.ID), "serial": svid.SerialNumber,
			"not_after": svid.NotAfter.Unix(), "authority": svid.AuthorityID, "by": "pod_certificate", "cluster": s.c.Cluster, "request": r.Namespace + "/" + r.Name,
			"pod": g.pod.Namespace + "/" + g.pod.Name, "pod_uid": g.pod.UID, "node": g.pod.NodeName, "node_uid": g.pod.NodeUID}})
	if err != nil {
		return err // nothing leaves unlogged
	}
	if g.entry.Canary && s.c.Canary != nil {
		s.c.Canary(ctx, g.entry.SPIFFEID, "x509", "pod "+g.pod.Namespace+"/"+g.pod.Name+" of cluster "+s.c.Cluster, g.pod.NodeName)
	}
	// A key store can take long. What was signed for a pod that is gone, or after a ban or a revocation, does not leave.
	if _, err := s.judge(r); err != nil {
		return err
	}
	notAfter, half := metav1.NewTime(svid.NotAfter), metav1.NewTime(svid.NotBefore.Add(svid.NotAfter.Sub(svid.NotBefore)/2).Truncate(time.Second))
	from := metav1.NewTime(svid.NotBefore)
	status := certificatesv1beta1.PodCertificateRequestStatus{CertificateChain: encode(svid.Chain), NotBefore: &from, BeginRefreshAt: &half, NotAfter: &notAfter,
		Conditions: s.condition(certificatesv1beta1.PodCertificateRequestConditionTypeIssued, "Issued", "X509-SVID of "+g.entry.SPIFFEID.String())}
	if err := s.update(ctx, r, status); err != nil {
		return err
	}
	s.c.Issued("x509", "", 1)
	return nil
}

// signer is the actor in the audit log.
func (c *Config) signer() string { return "kubernetes:" + c.Cluster + "/podcertificaterequests" }

// deny tells the kubelet, who shows it in an Event on the pod.
func (s *Signer) deny(ctx context.Context, r *certificatesv1beta1.PodCertificateRequest, d *denial) error {
	err := s.update(ctx, r, certificatesv1beta1.PodCertificateRequestStatus{Conditions: s.condition(certificatesv1beta1.PodCertificateRequestConditionTypeDenied, d.reason, d.message)})
	if err != nil {
		return err
	}
	s.c.Issued("x509", "refused", 1)
	// Refusals get nothing of the log's reserve, as at the other doors.
	rec := auditlog.Record{Time: s.c.Now(), Event: "x509svid.refused", Actor: s.c.signer(), ActorKind: "system", Subject: clip(r.Namespace + "/" + r.Spec.PodName), Outcome: auditlog.Refused,
		Details: map[string]any{"reason": clip(d.reason + ": " + d.message), "cluster": s.c.Cluster, "request": r.Namespace + "/" + r.Name, "pod_uid": clip(string(r.Spec.PodUID)), "node": clip(string(r.Spec.NodeName))}}
	if err := s.c.Audit.Append(context.WithoutCancel(ctx), auditlog.New, rec); err != nil {
		s.c.Log.Error("audit of refusals", "event", rec.Event, "count", 1, "err", err)
	}
	return nil
}

// maxMessageBytes bounds the message of a condition below the API's 32,768.
const maxMessageBytes = 4 << 10

func (s *Signer) condition(kind, reason, message string) []metav1.Condition {
	if len(message) > maxMessageBytes {
		message = message[:maxMessageBytes]
	}
	return []metav1.Condition{{Type: kind, Status: metav1.ConditionTrue, Reason: reason, Message: strings.ToValidUTF8(message, "?"), LastTransitionTime: metav1.NewTime(s.c.Now())}}
}

// update writes the answer, unless the request has changed since: another replica may have answered it, or it is gone.
func (s *Signer) update(ctx context.Context, r *certificatesv1beta1.PodCertificateRequest, status certificatesv1beta1.PodCertificateRequestStatus) error {
	answer := r.DeepCopy()
	answer.Status = status
	_, err := s.c.Requests(r.Namespace).UpdateStatus(ctx, answer, metav1.UpdateOptions{})
	switch {
	case err == nil, apierrors.IsNotFound(err):
		return nil
	case apierrors.IsConflict(err):
		return errLater // the request as it is now comes by the watch
	}
	return fmt.Errorf("writing the answer: %w", err)
}

// encode returns a chain in PEM, the leaf first.
func encode(chain [][]byte) string {
	var b bytes.Buffer
	for _, der := range chain {
		// Writing into memory does not fail.
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	return b.String()
}
