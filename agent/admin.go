package agent

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-id/signet/agent/adminapi"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
)

// A contact is whether there is contact to the CA, and since when.
type contact struct {
	there bool
	since time.Time
}

// openAdmin makes the admin socket. Without it workloads are served all the same, unless the configuration asked for it.
func (a *Agent) openAdmin() error {
	c := a.config.AdminSocket
	if c.Path == "" {
		return nil
	}
	services, err := a.openDelegated()
	if err != nil {
		return err
	}
	admin, err := adminapi.New(adminapi.Config{Socket: c.socket(), Status: a.describe, Explain: a.explain, Services: services, Executables: a.config.Executables, Decisions: a.decisions(), Log: a.log})
	switch {
	case err == nil:
		a.admin = admin
	case c.isDefault:
		a.log.Warn("there is no admin socket: signet why and signet agent status do not work on this node; name another place with admin_socket.path",
			"path", c.Path, "err", err)
	default:
		return fmt.Errorf("admin_socket: %w", err)
	}
	return nil
}

// AdminPath is the path of the admin socket, or empty.
func (a *Agent) AdminPath() string {
	if a.admin == nil {
		return ""
	}
	return a.admin.Path()
}

// describe is the agent's state for its operator.
func (a *Agent) describe(ctx context.Context) *agentv1.GetStatusResponse {
	s := a.Status()
	out := &agentv1.GetStatusResponse{
		State: string(s.State), Detail: s.Detail, NotReady: s.notReady(), TrustDomain: a.config.TrustDomain, Attestor: s.Attestor,
		Ca:    &agentv1.CA{Address: a.config.ServerAddress, Connected: s.Connected, Since: stamp(s.Since), Error: s.Trouble, Server: s.Server},
		Epoch: s.Epoch, Revision: s.Revision,
		Entries: int64(s.Entries), X509Svids: int64(s.X509SVIDs), JwtSvids: int64(s.JWTSVIDs), Streams: int64(s.Streams),
		SocketPath: a.config.SocketPath, Serving: s.Serving,
		Version: a.config.Version, StartedAt: stamp(a.started), Now: stamp(a.config.Now()), NotAfter: stamp(s.NotAfter),
	}
	if !s.ID.IsZero() {
		out.Id = s.ID.String()
	}
	if c := a.config.SealedCache; !c.Disable {
		out.SealedCache = &agentv1.SealedCache{Key: c.Key, Error: s.SealedCache, RestoredAt: stamp(s.RestoredAt), LastContact: stamp(s.LastContact)}
	}
	if !s.Connected && !s.OfflineSince.IsZero() {
		out.Ca.Since = stamp(s.OfflineSince) // the loss may have been in an earlier run
	}
	for _, m := range a.attestor.Health(ctx) {
		one := &agentv1.Attestor{Name: m.Method, Asked: m.Asked, Incomplete: m.Incomplete, LastErrorPid: m.LastPID, LastErrorAt: stamp(m.LastAt)}
		if m.Unavailable != nil {
			one.Unavailable = cmp.Or(m.Unavailable.Error(), "no reason was given")
		}
		if m.Last != nil {
			one.LastError = m.Last.Error()
		}
		out.Attestors = append(out.Attestors, one)
	}
	return out
}

// stamp is a moment on the wire; the zero value is absent there.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
