package ca

import (
	"context"
	"fmt"
	"time"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/registry"
)

// checkRevokedAuthority refuses the revocation of an authority that signs now, or is about to: what it signed would be dead as
// soon as it is issued.
func (ca *CA) checkRevokedAuthority(id string) error {
	for _, a := range ca.set.Authorities(authority.KindX509) {
		if a.ID == id && (a.State == authority.StateActive || a.State == authority.StatePrepared) {
			return fmt.Errorf("%s is %s; activate another one first (`signet authority prepare --type x509`, then `signet authority activate`)", id, a.State)
		}
	}
	return nil
}

// expireRevocations removes what is revoked no longer.
func (ca *CA) expireRevocations(ctx context.Context) {
	gone, err := ca.reg.ExpireRevocations(ctx)
	if err != nil && ctx.Err() == nil {
		ca.log.Warn("removing revocations that ended", "err", err)
	}
	var records []auditlog.Record
	for _, r := range gone {
		records = append(records, auditlog.Record{Time: ca.c.Now(), Event: "revocation.expired", Actor: registry.ServerID(ca.td).String(), ActorKind: "system",
			Subject: registry.KindRevocation + "/" + r.Document.Name, Outcome: auditlog.Done, Details: map[string]any{"target": r.Target, "expires": r.Expires.Format(time.RFC3339)}})
		ca.log.Info("a revocation ended", "name", r.Document.Name, "target", r.Target)
	}
	if len(records) > 0 {
		if err := ca.audit.Append(ctx, auditlog.Essential, records...); err != nil {
			ca.log.Error("audit of revocations that ended", "err", err)
		}
	}
}
