package registry

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
)

// A roll-out brings new versions of CallPolicies to a share of the agents first, and step by step to all. Until it is done
// the old version is what the registry holds; the new one is in the record of the roll-out. So whatever happens to the CA,
// the record alone says who has what, and rolling back is to forget the new version.

const (
	rolloutPrefix = "rollout/"
	// rolloutGuard is written with each start, and checked with each change of a CallPolicy: of a start and a change that
	// were planned at the same moment one fails.
	rolloutGuard = "rollouts"
)

// Bounds of roll-outs.
const (
	// MaxRollouts is how many may be under way. A denial is compared with each of them.
	MaxRollouts = 8
	// MaxRolloutPolicies is how many policies one may have: its end is one commit.
	MaxRolloutPolicies = store.MaxWrites - 2
	// maxRolloutBytes bounds their records together, likewise.
	maxRolloutBytes = store.MaxCommitBytes * 3 / 4
	maxRolloutSteps = 20
	maxBake         = 30 * 24 * time.Hour
	// keptRollouts is how many are kept that are over.
	keptRollouts = 50
)

// DefaultBake is how long a step lasts, unless the operator says otherwise.
const DefaultBake = 10 * time.Minute

// ErrInRollout means that a CallPolicy belongs to a roll-out that is under way.
var ErrInRollout = errors.New("is being rolled out")

// A RolloutState says where a roll-out stands.
type RolloutState string

// The states. All but the first are final.
const (
	RolloutRunning    RolloutState = "running"
	RolloutDone       RolloutState = "done"
	RolloutRolledBack RolloutState = "rolled_back" // by itself
	RolloutAborted    RolloutState = "aborted"     // by an operator
)

// A Rollout is never changed in place.
type Rollout struct {
	Name  string
	Steps []int // shares of the agents in percent, rising, the last 100
	Step  int   // index of the present one
	Bake  time.Duration
	// MaxDenials is how many denials of formerly allowed calls there may be; negative: any number.
	MaxDenials int64
	State      RolloutState
	Denials    int64
	// Reports says who reported how many of Denials, as far as that is kept; the most is never too little.
	Reports []RolloutReports
	// Returned is the agent that has the former versions back because it alone reported too many denials; Held says that no
	// step is made since then, until an operator promotes.
	Returned spiffeid.ID
	Held     bool
	// Reason is why it ended early or is held, By who began it.
	Reason, By string
	StartedAt  time.Time
	StepAt     time.Time // when the present step began
	EndedAt    time.Time
	Policies   []RolledPolicy
	// Created is the revision that began it, Revision the one of its last change.
	Created, Revision store.Revision
}

// RolloutReports are the denials that one agent reported.
type RolloutReports struct {
	Agent   spiffeid.ID
	Denials int64
}

// A RolledPolicy is one policy of a roll-out.
type RolledPolicy struct {
	Name string
	// Former is the revision of what it replaces; 0 if there is nothing.
	Former store.Revision
	// Policy is the new version; nil once the roll-out is over.
	Policy *Policy

	record json.RawMessage
}

type rolloutRecord struct {
	V          int                   `json:"v"`
	Steps      []int                 `json:"steps"`
	Step       int                   `json:"step"`
	Bake       int64                 `json:"bake"` // seconds
	MaxDenials int64                 `json:"max_denials"`
	State      RolloutState          `json:"state"`
	Denials    int64                 `json:"denials,omitempty"`
	Reason     string                `json:"reason,omitempty"`
	By         string                `json:"by,omitempty"`
	StartedAt  int64                 `json:"started_at"`
	StepAt     int64                 `json:"step_at"`
	EndedAt    int64                 `json:"ended_at,omitempty"`
	Policies   []rolloutPolicyRecord `json:"policies"`
	Reports    []rolloutReportRecord `json:"reports,omitempty"`
	Returned   string                `json:"returned,omitempty"`
	Held       bool                  `json:"held,omitempty"`
}

type rolloutReportRecord struct {
	Agent   string `json:"agent"`
	Denials int64  `json:"denials"`
}

type rolloutPolicyRecord struct {
	Name   string          `json:"name"`
	Former store.Revision  `json:"former,omitempty"`
	Record json.RawMessage `json:"record,omitempty"` // as it will be stored
}

func (o *Rollout) encode() ([]byte, error) {
	rec := rolloutRecord{V: recordVersion, Steps: o.Steps, Step: o.Step, Bake: int64(o.Bake / time.Second), MaxDenials: o.MaxDenials, State: o.State, Denials: o.Denials,
		Reason: o.Reason, By: o.By, StartedAt: unix(o.StartedAt), StepAt: unix(o.StepAt), EndedAt: unix(o.EndedAt), Held: o.Held}
	if !o.Returned.IsZero() {
		rec.Returned = o.Returned.String()
	}
	for _, a := range o.Reports {
		rec.Reports = append(rec.Reports, rolloutReportRecord{a.Agent.String(), a.Denials})
	}
	for _, p := range o.Policies {
		rec.Policies = append(rec.Policies, rolloutPolicyRecord{p.Name, p.Former, p.record})
	}
	return marshal(rec)
}

func decodeRollout(name string, it store.Item) (*Rollout, error) {
	var rec rolloutRecord
	if err := decodeRecord(it, &rec, func() int { return rec.V }); err != nil {
		return nil, err
	}
	o := &Rollout{Name: name, Steps: rec.Steps, Step: rec.Step, Bake: time.Duration(rec.Bake) * time.Second, MaxDenials: rec.MaxDenials, State: rec.State, Denials: rec.Denials,
		Reason: rec.Reason, By: rec.By, StartedAt: fromUnix(rec.StartedAt), StepAt: fromUnix(rec.StepAt), EndedAt: fromUnix(rec.EndedAt), Held: rec.Held, Created: it.Created, Revision: it.Modified}
	var err error
	if rec.Returned != "" {
		if o.Returned, err = spiffeid.FromString(rec.Returned); err != nil {
			return nil, fmt.Errorf("record %s: returned: %w (is the store damaged?)", it.Key, err)
		}
	}
	for _, a := range rec.Reports {
		id, err := spiffeid.FromString(a.Agent)
		if err != nil {
			return nil, fmt.Errorf("record %s: reports: %w (is the store damaged?)", it.Key, err)
		}
		o.Reports = append(o.Reports, RolloutReports{id, a.Denials})
	}
	if len(o.Steps) == 0 || o.Step < 0 || o.Step >= len(o.Steps) {
		return nil, fmt.Errorf("record %s: step %d of %d (is the store damaged?)", it.Key, o.Step, len(o.Steps))
	}
	for _, p := range rec.Policies {
		rolled := RolledPolicy{Name: p.Name, Former: p.Former, record: p.Record}
		if len(p.Record) > 0 {
			if rolled.Policy, err = decodePolicy(store.Item{Key: it.Key, Value: p.Record, Created: it.Created, Modified: it.Created}); err != nil {
				return nil, err
			}
		}
		o.Policies = append(o.Policies, rolled)
	}
	return o, nil
}

// running tells whether the new versions are with some agents.
func (o *Rollout) running() bool { return o.State == RolloutRunning }

// Percent is the share of the agents that has the new versions now.
func (o *Rollout) Percent() int {
	switch o.State {
	case RolloutRunning:
		return o.Steps[o.Step]
	case RolloutDone:
		return 100
	}
	return 0
}

// Includes tells whether an agent is among those that have the new versions. The name of the roll-out and the agent's ID
// decide alone, so that it stays on its side over restarts, of itself and of the CA, and at every replica; and who is in at
// one step is in at the next, unless its own reports gave it the former versions back.
func (o *Rollout) Includes(agent spiffeid.ID) bool {
	if agent == o.Returned {
		return false
	}
	const whole = 1 << 32
	sum := sha256.Sum256([]byte("signet roll-out\x00" + o.Name + "\x00" + agent.String()))
	return uint64(binary.BigEndian.Uint32(sum[:]))*100 < uint64(o.Percent())*whole
}

// rollouts are those of the index.
type rollouts struct {
	byName   map[string]*Rollout
	ofPolicy map[string]*Rollout // policies that are being rolled out
	guard    store.Revision
}

func newRollouts() rollouts {
	return rollouts{byName: map[string]*Rollout{}, ofPolicy: map[string]*Rollout{}}
}

func (os *rollouts) apply(name string, ev store.Event) error {
	if old := os.byName[name]; old != nil {
		for _, p := range old.Policies {
			if os.ofPolicy[p.Name] == old {
				delete(os.ofPolicy, p.Name)
			}
		}
		delete(os.byName, name)
	}
	if ev.Deleted {
		return nil
	}
	o, err := decodeRollout(name, ev.Item)
	if err != nil {
		return err
	}
	os.byName[name] = o
	if o.running() {
		for _, p := range o.Policies {
			os.ofPolicy[p.Name] = o
		}
	}
	return nil
}

// running returns those under way, in order of name.
func (os *rollouts) running() []*Rollout {
	var out []*Rollout
	for _, o := range os.byName {
		if o.running() {
			out = append(out, o)
		}
	}
	slices.SortFunc(out, func(a, b *Rollout) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// refuse says which roll-out keeps a policy from being changed.
func (os *rollouts) refuse(policy string) error {
	if o := os.ofPolicy[policy]; o != nil {
		return fmt.Errorf("CallPolicy %q %w by %q: promote or abort that first (signet rollout promote|abort %s)", policy, ErrInRollout, o.Name, o.Name)
	}
	return nil
}

// Rollouts returns all that are known, those under way first, then the last ended first.
func (r *Registry) Rollouts() []*Rollout {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := make([]*Rollout, 0, len(r.ix.rollouts.byName))
	for _, o := range r.ix.rollouts.byName {
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b *Rollout) int {
		switch {
		case a.running() != b.running():
			if a.running() {
				return -1
			}
			return 1
		case !a.EndedAt.Equal(b.EndedAt):
			return b.EndedAt.Compare(a.EndedAt)
		}
		return strings.Compare(a.Name, b.Name)
	})
	return out
}

// Rollout returns one. ErrNotFound if there is none.
func (r *Registry) Rollout(name string) (*Rollout, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if o := r.ix.rollouts.byName[name]; o != nil {
		return o, nil
	}
	return nil, fmt.Errorf("roll-out %q: %w", clip(name), ErrNotFound)
}

// RolloutAgents counts the agents that follow this replica and that a roll-out's policies concern, and returns the IDs of
// those that have the new versions, in order.
func (r *Registry) RolloutAgents(name string) (concerned int, first []spiffeid.ID) {
	r.follow.mu.Lock()
	defer r.follow.mu.Unlock()
	for f := range r.follow.active {
		if sides := f.sides.Load(); sides != nil {
			if in, ok := (*sides)[name]; ok {
				concerned++
				if in {
					first = append(first, f.agent)
				}
			}
		}
	}
	slices.SortFunc(first, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
	return concerned, first
}
