package registry

import (
	"maps"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// This file holds how far this replica has followed the clusters whose pods have entries here. The store's revisions say nothing of
// it, and replicas do not follow in step. So an agent says how far the replica was that told it last, and one that has not come as
// far takes no pod's entry from it and gives none back, until it has. [docs/decisions/0048-replicas-and-clusters.md]

// A Position is how far a cluster was followed: resource versions by what they are of. It is never changed in place.
type Position map[string]uint64

// behind tells whether this replica has yet to see what one at p had seen.
func (have Position) behind(p Position) bool {
	for of, version := range p {
		if at, followed := have[of]; followed && at < version {
			return true
		}
	}
	return false
}

// with returns have where what is newer in p is as new.
func (have Position) with(p Position) Position {
	out := maps.Clone(have)
	if out == nil {
		out = Position{}
	}
	maps.Copy(out, p)
	return out
}

// A Claim is what an agent says that it was told of its node's cluster. It may be a lie: all that it is good for is that the agent
// is told less.
type Claim struct {
	Cluster  string
	Position Position
}

// Telling says, before entries of a cluster's pods are set, how new the newest change is by which they come or go. What an agent is
// sent from now on may tell of it.
func (r *Registry) Telling(cluster string, p Position) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ix.derived.told[cluster] = r.ix.derived.told[cluster].with(p)
}

// Followed says, after entries were set, up to where everything of a cluster is in them.
func (r *Registry) Followed(cluster string, p Position) {
	r.mu.Lock()
	defer r.mu.Unlock()
	have := r.ix.derived.followed[cluster].with(p)
	r.ix.derived.followed[cluster] = have
	r.follow.caughtUp(cluster, func(f *Follower) bool { return !have.behind(f.claim) })
}

// caughtUp lets those followers that wait for a cluster, and of which done says so, be told what there is.
func (fs *followers) caughtUp(cluster string, done func(*Follower) bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for f, of := range fs.behind {
		if of == cluster && done(f) {
			delete(fs.behind, f)
			f.known = true
			f.signal()
		}
	}
}

// Waits tells whether the agent was told more of its cluster than is known here.
func (f *Follower) Waits() bool {
	f.r.follow.mu.Lock()
	defer f.r.follow.mu.Unlock()
	_, waits := f.r.follow.behind[f]
	return waits
}

// Waiting returns the followers that wait until this replica has come as far in a cluster as the one that told them last.
func (r *Registry) Waiting(cluster string) []*Follower {
	r.follow.mu.Lock()
	defer r.follow.mu.Unlock()
	var out []*Follower
	for f, of := range r.follow.behind {
		if of == cluster {
			out = append(out, f)
		}
	}
	return out
}

// Behind returns a channel that is signalled when a follower begins to wait for a cluster. It is the same for all callers.
func (r *Registry) Behind(cluster string) <-chan struct{} {
	r.follow.mu.Lock()
	defer r.follow.mu.Unlock()
	return r.follow.behindOf(cluster)
}

func (fs *followers) behindOf(cluster string) chan struct{} {
	c := fs.behindChanged[cluster]
	if c == nil {
		c = make(chan struct{}, 1)
		fs.behindChanged[cluster] = c
	}
	return c
}

// Refute ends the wait of those among waiting who claim more of a cluster than there was at its API server when somebody looked, after
// Waiting had named them: the claim is not true, or from before the API server was restored.
func (r *Registry) Refute(cluster string, waiting []*Follower, there Position) (refuted int) {
	named := make(map[*Follower]bool, len(waiting))
	for _, f := range waiting {
		named[f] = true
	}
	r.follow.caughtUp(cluster, func(f *Follower) bool {
		untrue := named[f] && there.behind(f.claim)
		if untrue {
			refuted++
		}
		return untrue
	})
	return refuted
}

// isBehind tells whether an agent was told more of its pods by another replica than this one knows. A stream that has just been
// replaced may be the one that says so.
func (fs *followers) isBehind(agent spiffeid.ID) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for f := range fs.byAgent[agent] {
		if _, behind := fs.behind[f]; behind {
			return true
		}
	}
	return false
}
