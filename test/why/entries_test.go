package why

import (
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/why"
)

// server starts a program of uid 4711 and returns what an entry for it asks for.
func (w *world) server() (int32, []string) {
	w.Helper()
	path := w.program("web/server")
	return w.run(path, as(4711, 4711)), []string{"unix:uid:4711", "unix:path:" + path}
}

// entrySetups have an entry whose selectors hold, and which does not help.
var entrySetups = []setup{
	{name: "entry of another node", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.entry(entrySpec{parent: w.otherNode(), selectors: s})
		return pid(p)
	}, want: why.EntryOtherNode, says: "signet entry create --spiffe-id spiffe://example.org/web --parent-id spiffe://example.org/spire/agent/join_token/"},
	{name: "entry that was moved to another node", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		id := w.entry(entrySpec{selectors: s})
		w.updateEntry(&types.Entry{Id: id, ParentId: spiffeID(w.otherNode())}, &types.EntryMask{ParentId: true})
		w.held(id, false)
		return pid(p)
	}, want: why.EntryOtherNode, says: "another node"},
	{name: "parent that never attested", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.entry(entrySpec{parent: "spiffe://example.org/spire/agent/join_token/nobody", selectors: s})
		return pid(p)
	}, want: why.WrongParent, says: "does not know"},
	{name: "parent that is a workload", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.entry(entrySpec{parent: "spiffe://example.org/frontend", selectors: s})
		return pid(p)
	}, want: why.WrongParent, says: "neither an agent nor a group of nodes"},
	{name: "parent is a group that this node is not in", root: true, make: maker{Groups: []string{"frontend"}}, build: func(w *world) why.Target {
		p, s := w.server()
		w.entry(entrySpec{spiffeID: "/nodes/backend", parent: "spiffe://example.org/spire/server", selectors: []string{"node:group:backend"}})
		w.entry(entrySpec{parent: "spiffe://example.org/nodes/backend", selectors: s})
		return pid(p)
	}, want: why.EntryOtherNode, says: "node:group:backend"},
	{name: "Identity for other nodes", root: true, make: maker{Groups: []string{"frontend"}}, build: func(w *world) why.Target {
		p, s := w.server()
		w.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: ['" + s[0] + "', '" + s[1] + "']\non: [node:group:backend]\n")
		return pid(p)
	}, want: why.EntryOtherNode, says: "under `on`"},
	{name: "Identity with a typo", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: ['" + s[0] + "', '" + s[1] + "s']\n")
		w.held("identity.web", true)
		return pid(p)
	}, want: why.Typo, says: "Identity web"},
	{name: "entry just deleted", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.deleteEntry(w.entry(entrySpec{selectors: s}))
		return pid(p)
	}, want: why.EntryDeleted, says: "was deleted at"},
	{name: "entry deleted and made anew with a typo", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.deleteEntry(w.entry(entrySpec{selectors: s}))
		w.deleteEntry(w.entry(entrySpec{selectors: s}))
		w.entry(entrySpec{selectors: []string{s[0], s[1] + "s"}})
		return pid(p)
	}, want: why.Typo, says: "signet entry update "},
	{name: "only entry that came near is deleted", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.deleteEntry(w.entry(entrySpec{selectors: []string{s[0], s[1] + "s"}}))
		return pid(p)
	}, want: why.NoEntry, says: "signet entry create "},
	{name: "entry just deleted, and the CA cannot be asked", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.deleteEntry(w.entry(entrySpec{selectors: s}))
		w.noCA = true
		return pid(p)
	}, want: why.EntryDeleted, says: "or given to other nodes"},
	{name: "entry expired", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.entry(entrySpec{selectors: s, expires: 10 * time.Minute})
		w.offset.Store(int64(11 * time.Minute))
		return pid(p)
	}, want: why.EntryExpired, says: "--expires-in 0"},
	{name: "the CA cannot be asked about other nodes", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.entry(entrySpec{parent: w.otherNode(), selectors: s})
		w.noCA = true
		return pid(p)
	}, want: why.NoEntry, says: "only the CA knows"},
	{name: "two entries with one hint", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		a := w.entry(entrySpec{spiffeID: "/old", selectors: s, hint: "main"})
		b := w.entry(entrySpec{spiffeID: "/new", selectors: s, hint: "main"})
		w.issued(a)
		_ = b
		return pid(p)
	}, want: why.HintCollision, says: "main-2"},
	{name: "federation with a trust domain whose bundle is not there", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.issued(w.entry(entrySpec{selectors: s, federates: []string{"partner.example"}}))
		return pid(p)
	}, want: why.BundleMissing, says: "partner.example"},
	{name: "ID of another trust domain", build: func(w *world) why.Target { return why.Target{ID: "spiffe://partner.example/billing"} },
		want: why.OtherTrustDomain, says: "--federates-with partner.example"},
	{name: "ID that nobody has", build: func(w *world) why.Target { return why.Target{ID: "/wbe"} }, want: why.UnknownID, says: "nor does the CA"},
	{name: "ID that only another node has", build: func(w *world) why.Target {
		w.entry(entrySpec{parent: w.otherNode(), selectors: []string{"unix:uid:1"}})
		return why.Target{ID: "/web"}
	}, want: why.EntryOtherNode, says: "another node"},
	{name: "ID whose entry is for a CA below", build: func(w *world) why.Target {
		w.issued(w.entry(entrySpec{spiffeID: "/below", selectors: []string{"unix:uid:1"}, downstream: true}))
		return why.Target{ID: "/below"}
	}, want: why.EntryDownstream, says: "a CA below this one"},
	{name: "ID whose entry is for an admin", build: func(w *world) why.Target {
		w.issued(w.entry(entrySpec{spiffeID: "/operator", selectors: []string{"unix:uid:1"}, admin: true}))
		return why.Target{ID: "/operator"}
	}, want: why.EntryDownstream, says: "an admin of the CA"},
	{name: "ID that nobody asks for", build: func(w *world) why.Target {
		w.issued(w.entry(entrySpec{selectors: []string{"unix:uid:1"}}))
		return why.Target{ID: "/web"}
	}, want: why.NobodyAsked, says: "signet why PID"},
	{name: "ID whose caller has a typo in its entry", root: true, build: func(w *world) why.Target {
		w.entry(entrySpec{selectors: []string{"unix:uid:4711", "unix:user:nobdy"}})
		w.caller("once", as(65534, 4711))
		w.caller("once", as(4711, 4711))
		return why.Target{ID: "/web"}
	}, want: why.SelectorMissing, says: "unix:user:nobdy"},
	{name: "entry whose TTL is longer than the authority lives", root: true, make: maker{CA: func(c *ca.Config) {
		c.Authorities.X509Lifetime, c.Authorities.Rotate, c.TTL.MaxX509, c.TTL.Agent = 10*time.Hour, "manual", 9*time.Hour, 3*time.Hour
	}}, build: func(w *world) why.Target {
		p, s := w.server()
		id := w.entry(entrySpec{selectors: s, ttl: 9 * time.Hour})
		w.issued(id)
		w.offset.Store(int64(100 * time.Minute))
		w.startAlone(noCache)
		w.held(id, true)
		w.issued(id)
		return pid(p)
	}, want: why.TTLBeyondAuthority, says: "no SVID outlives its authority"},
	{name: "entry that is all right", root: true, build: func(w *world) why.Target {
		p, s := w.server()
		w.issued(w.entry(entrySpec{selectors: s}))
		return pid(p)
	}, want: why.Served, says: "spiffe://example.org/web"},
	{name: "entry for a container, and the process is in none", root: true, make: maker{Agent: func(c *agent.Config) { c.WorkloadAttestation.Docker = &agent.DockerAttestation{} }},
		build: withSelector("docker:label:app:web", as(4711, 4711)), want: why.NotInContainer, says: "docker:label:app:web"},
	{name: "entry for a systemd unit, where there is no systemd", root: true, make: maker{Agent: func(c *agent.Config) {
		c.WorkloadAttestation.Systemd = &agent.SystemdAttestation{BusSocket: "/nowhere/bus"}
	}}, build: withSelector("systemd:id:web.service", as(4711, 4711)), want: why.NotInUnit, says: "no systemd on this machine"},
}
