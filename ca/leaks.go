package ca

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/access"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
)

// leaks raises the alarm when a secret seems to be in wrong hands: a record in the audit log, a warning in the log, a
// metric, and by configuration a revocation. [docs/decisions/0027]
type leaks struct {
	ca *CA

	// mu guards raised: when the same alarm was raised last.
	mu     sync.Mutex
	raised map[string]time.Time
}

const (
	// quietAlarm is for how long the same alarm is not raised again.
	quietAlarm = 10 * time.Minute
	// maxRaised bounds the alarms that are remembered.
	maxRaised = 10_000
	// revokeTime bounds an automatic revocation.
	revokeTime = 10 * time.Second
)

func newLeaks(ca *CA) *leaks { return &leaks{ca: ca, raised: map[string]time.Time{}} }

// An alarm is one sign of a leak.
type alarm struct {
	kind     string // as in the metric
	subject  string // whose secret it is
	address  string // where it showed
	text     string // for people
	details  map[string]any
	document string // a Revocation without its kind and name, if this alarm may revoke
}

// first tells whether an alarm is not one that was raised a moment ago.
func (l *leaks) first(key string) bool {
	now := l.ca.c.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if at, was := l.raised[key]; was && now.Sub(at).Abs() < quietAlarm {
		return false
	}
	if len(l.raised) >= maxRaised {
		for k, at := range l.raised {
			if now.Sub(at).Abs() >= quietAlarm {
				delete(l.raised, k)
			}
		}
		if len(l.raised) >= maxRaised {
			return false // ten thousand different alarms in ten minutes are noted by the metric alone
		}
	}
	l.raised[key] = now
	return true
}

// raise raises an alarm. That its cause hangs up changes nothing.
func (l *leaks) raise(ctx context.Context, a alarm) {
	ctx = context.WithoutCancel(ctx)
	l.ca.metrics.leaks.WithLabelValues(a.kind).Inc()
	host, _, err := net.SplitHostPort(a.address)
	if err != nil {
		host = a.address
	}
	if !l.first(a.kind + " " + a.subject + " " + host) {
		return
	}
	if a.details == nil {
		a.details = map[string]any{}
	}
	a.details["address"], a.details["what"] = a.address, a.text
	l.ca.log.Warn("a secret may be in wrong hands: "+a.text, "kind", a.kind, "spiffe_id", a.subject, "address", a.address)
	l.append(ctx, auditlog.Record{Event: "leak." + a.kind, Subject: a.subject, Outcome: auditlog.Done, Details: a.details})
	if a.document == "" || !l.ca.reconfigured.Load().Leaks.Revoke {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, revokeTime)
	defer cancel()
	name, target, err := l.revoke(ctx, a)
	rec := auditlog.Record{Event: "leak.revoked", Subject: a.subject, Outcome: auditlog.Done, Details: map[string]any{"revocation": name, "target": target, "kind": a.kind}}
	if err != nil {
		rec.Outcome, rec.Details["reason"] = auditlog.Failed, err.Error()
		l.ca.log.Error("what leaked was not revoked; do it now by hand", "spiffe_id", a.subject, "err", err)
	} else {
		l.ca.log.Warn("revoked what leaked (leaks.revoke)", "spiffe_id", a.subject, "revocation", name)
	}
	l.append(ctx, rec)
}

func (l *leaks) append(ctx context.Context, r auditlog.Record) {
	r.Time, r.Actor, r.ActorKind = l.ca.c.Now(), registry.ServerID(l.ca.td).String(), "system"
	if err := l.ca.audit.Append(ctx, auditlog.Essential, r); err != nil {
		l.ca.log.Error("audit of a leak", "event", r.Event, "spiffe_id", r.Subject, "err", err)
	}
}

// revoke applies the document of an alarm, as an operator would.
func (l *leaks) revoke(ctx context.Context, a alarm) (name, target string, err error) {
	b := make([]byte, 4)
	rand.Read(b) // never fails since Go 1.24
	name = fmt.Sprintf("leak-%s-%s-%s", strings.ReplaceAll(a.kind, "_", "-"), l.ca.c.Now().UTC().Format("20060102t150405"), hex.EncodeToString(b))
	content := fmt.Sprintf("kind: Revocation\nname: %s\n%sreason: %q\n", name, a.document, "alarm: "+a.kind)
	docs, err := strictyaml.Split([]byte(content), "leaks.revoke", 1)
	if err != nil {
		return name, "", err
	}
	const attempts = 4
	for range attempts {
		p, err := l.ca.reg.Plan(docs, registry.Options{})
		if err != nil {
			return name, "", err
		}
		if len(p.Bans) > 0 {
			for _, id := range p.Bans {
				if err := l.ban(ctx, id); err != nil {
					return name, "", err
				}
			}
			continue // what it obtained until it was banned is to be revoked
		}
		if _, err = l.ca.reg.Apply(store.WithReserve(ctx), p); !errors.Is(err, registry.ErrConflict) {
			return name, p.Changes[0].Revocation.Target, err
		}
	}
	return name, "", registry.ErrConflict
}

func (l *leaks) ban(ctx context.Context, id spiffeid.ID) error {
	const attempts = 8
	for range attempts {
		n, err := l.ca.reg.NodeNow(ctx, id)
		if errors.Is(err, registry.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		n.Banned, n.Active, n.Serial, n.NewSerial = true, true, "", ""
		if err = l.ca.reg.PutNode(store.WithReserve(ctx), n, nil); !errors.Is(err, registry.ErrConflict) {
			l.append(ctx, auditlog.Record{Event: "agent.ban", Subject: id.String(), Outcome: auditlog.Done, Details: map[string]any{"cause": "leaks.revoke"}})
			return err
		}
	}
	return registry.ErrConflict
}

func agentDocument(id spiffeid.ID) string { return fmt.Sprintf("agent: %q\n", id.String()) }

// superseded: an X509-SVID that another one has replaced is used from where the agent was not when it was replaced. An agent
// that was cloned, or whose key was copied, cannot avoid that: one of the two renews first.
func (l *leaks) superseded(ctx context.Context, c *access.Caller, n *registry.Node) {
	l.raise(ctx, alarm{kind: "superseded_svid", subject: n.ID.String(), address: c.Address, document: agentDocument(n.ID),
		text:    "an agent's X509-SVID that was renewed from elsewhere is used: the agent, or its key, is in two places",
		details: map[string]any{"serial": c.Serial, "current_serial": n.Serial, "places": n.Places, "was_the_last": c.Serial == n.Former}})
}

// OldKey implements nodeapi.Leaks.
func (l *leaks) OldKey(ctx context.Context, agent spiffeid.ID, address string) {
	l.raise(ctx, alarm{kind: "old_key", subject: agent.String(), address: address, document: agentDocument(agent),
		text: "somebody elsewhere has the key of an agent from before its last renewal: its disk was copied, or an old copy was put back on another machine"})
}

// TokenReused implements nodeapi.Leaks. It never revokes: whoever finds an old token could otherwise shut a node out.
func (l *leaks) TokenReused(ctx context.Context, agent spiffeid.ID, address string, samePlace bool) {
	l.raise(ctx, alarm{kind: "token_reused", subject: agent.String(), address: address,
		text:    "a join token that a node has used was shown again with its secret, by another key",
		details: map[string]any{"same_place": samePlace}})
}

// CanaryIssued implements nodeapi.Leaks.
func (l *leaks) CanaryIssued(ctx context.Context, id spiffeid.ID, kind, by, address string) {
	l.raise(ctx, alarm{kind: "canary_issued", subject: id.String(), address: address, document: fmt.Sprintf("id: %q\n", id.String()),
		text: "somebody obtained an SVID for a canary identity, which nobody should ever hold", details: map[string]any{"type": kind, "obtained_by": by}})
}

// CanaryUsed implements nodeapi.Leaks.
func (l *leaks) CanaryUsed(ctx context.Context, agent spiffeid.ID, o *policyv1.Observation) {
	l.raise(ctx, alarm{kind: "canary_used", subject: o.Peer, address: agent.String(), document: fmt.Sprintf("id: %q\n", o.Peer),
		text:    "a canary identity, which nobody should ever use, called a service",
		details: map[string]any{"service": o.Service, "allowed": o.Allowed, "count": o.Count, "reported_by": agent.String()}})
}
