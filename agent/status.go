package agent

import (
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A State is what the agent is doing about its CA. None is terminal.
type State string

// The states of an agent.
const (
	// Starting: nothing was tried yet.
	Starting State = "starting"
	// Attesting: the agent proves to the CA what this node is.
	Attesting State = "attesting"
	// Connecting: there is no connection to the CA; what is held is served.
	Connecting State = "connecting"
	// InSync: the agent holds the CA's newest state.
	InSync State = "in sync"
	// Refused: the CA does not take the agent's SVID (any more); what is held is served.
	Refused State = "refused"
	// Banned: an operator has banned the agent; nothing new is issued.
	Banned State = "banned"
)

// states are all of them.
var states = [...]State{Starting, Attesting, Connecting, InSync, Refused, Banned}

// Status is the state of an agent at one moment, for health checks and operators.
type Status struct {
	State State
	// Detail says why, where something is wrong.
	Detail string
	// ID is the agent's own, NotAfter the end of its SVID; zero before the first attestation.
	ID       spiffeid.ID
	NotAfter time.Time
	// Attestor is how this node attests: join_token, or the kind that node_attestation names.
	Attestor string
	// Connected says that the CA is there and has confirmed that the agent holds its newest state.
	Connected bool
	// Since is since when it is so, or is not; zero: it never was. Trouble says why it is not.
	Since   time.Time
	Trouble string
	// Server is what kind of CA answered last: signet, spire, or unknown. One of SPIRE's is polled, and has no call policies.
	Server string
	// Epoch and Revision name the state of the CA that is held; Revision 0: none yet.
	Epoch    string
	Revision int64
	// RestoredAt is when what is held was restored from the sealed cache; zero: it is what the CA said in this run.
	// LastContact is when the CA was there last, by what the cache says, in that case.
	RestoredAt, LastContact time.Time
	// OfflineSince is since when there has been no contact to the CA that was there before, also in an earlier run; zero: there is.
	OfflineSince time.Time
	// SealedCache is the state of the cache on disk in words, such as why it is not up to date. Empty: it is, or waits to be
	// written as it should.
	SealedCache string
	// Entries are the registration entries of this node; X509SVIDs and JWTSVIDs are those held; Streams are the open
	// subscriptions of workloads.
	Entries, X509SVIDs, JWTSVIDs, Streams int
	// Serving says that the Workload API answers.
	Serving bool
}

// Status returns the present state.
func (a *Agent) Status() Status {
	node, stats := a.node.status.Load(), a.cache.Stats()
	s := Status{
		State: node.state, Detail: node.detail, Attestor: a.node.kind(), Connected: a.client.Connected(), Server: a.client.Server().String(),
		Entries: stats.Entries, X509SVIDs: stats.X509SVIDs, JWTSVIDs: stats.JWTSVIDs, Streams: stats.Watchers, Serving: a.serving.Load(),
	}
	if s.State == InSync && !s.Connected {
		s.State = Connecting
	}
	s.Epoch, s.Revision = a.cache.Held()
	s.OfflineSince = stats.OfflineSince
	if c := a.contact.Load(); c != nil {
		s.Since = c.since
	} else {
		s.Since = stats.OfflineSince // of an earlier run
	}
	if err := a.client.Trouble(); err != nil && !s.Connected {
		s.Trouble = err.Error()
	}
	if r := a.cache.Restored(); r != nil {
		s.RestoredAt, s.LastContact = r.Restored, r.Contact
		words := fmt.Sprintf("serving from the sealed cache since %s, last contact with the CA at %s",
			r.Restored.UTC().Format(time.RFC3339), r.Contact.UTC().Format(time.RFC3339))
		s.Detail = joined(words, s.Detail)
	}
	switch {
	case a.sealed == nil:
		s.SealedCache = "disabled"
	default:
		if err := a.sealed.Status().Err; err != nil {
			s.SealedCache = err.Error()
			s.Detail = joined(s.Detail, "the sealed cache is not up to date on disk: "+s.SealedCache)
		}
	}
	if svid := a.node.identity(); svid != nil {
		s.ID, s.NotAfter = svid.ID, svid.Certificates[0].NotAfter
	}
	return s
}

func joined(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "; " + b
}

// notReady says which part keeps the agent from doing its work, or is empty. An agent without its CA is ready as long as
// it has the CA's state: it serves from memory.
func (s *Status) notReady() string {
	switch {
	case !s.Serving:
		return "workload api: not serving"
	case s.Revision == 0 && s.Detail != "":
		return "ca: " + string(s.State) + ": " + s.Detail
	case s.Revision == 0:
		return "ca: " + string(s.State) + ", nothing was synchronised yet"
	case s.State == Banned:
		return "ca: this agent is banned"
	}
	return ""
}
