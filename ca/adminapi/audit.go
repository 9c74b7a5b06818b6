package adminapi

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
)

const (
	defaultAuditLimit = 1000
	maxAuditLimit     = 100_000
	maxAuditEvents    = 64
)

// auditLine is the JSON form of a record, the same as in the log.
type auditLine struct {
	V         int            `json:"v"`
	Seq       uint64         `json:"seq"`
	Time      time.Time      `json:"time"`
	Event     string         `json:"event"`
	Actor     string         `json:"actor,omitempty"`
	ActorKind string         `json:"actor_kind,omitempty"`
	Subject   string         `json:"subject,omitempty"`
	Outcome   string         `json:"outcome,omitempty"`
	Details   map[string]any `json:"details,omitempty"`
}

func auditJSON(r auditlog.Record) ([]byte, error) {
	return json.Marshal(auditLine{1, r.Seq, r.Time.UTC(), r.Event, r.Actor, r.ActorKind, r.Subject, r.Outcome, r.Details})
}

// wanted tells whether a record is asked for beyond what the log filters itself.
func wanted(req *adminv1.SearchAuditRequest, r auditlog.Record) bool {
	if len(req.Events) > 0 {
		found := false
		for _, e := range req.Events {
			found = found || r.Event == e || strings.HasSuffix(e, ".") && strings.HasPrefix(r.Event, e)
		}
		if !found {
			return false
		}
	}
	return req.Text == "" || r.Actor == req.Text || r.Subject == req.Text || inDetails(r.Details, req.Text)
}

func inDetails(v any, text string) bool {
	switch v := v.(type) {
	case string:
		return v == text
	case json.Number:
		return v.String() == text
	case []any:
		for _, x := range v {
			if inDetails(x, text) {
				return true
			}
		}
	case map[string]any:
		for _, x := range v {
			if inDetails(x, text) {
				return true
			}
		}
	}
	return false
}

// SearchAudit implements signet.admin.v1: the newest matching records, oldest first, and with follow what comes after.
func (a *API) SearchAudit(req *adminv1.SearchAuditRequest, s grpc.ServerStreamingServer[adminv1.AuditRecord]) error {
	limit := int(req.Limit)
	switch {
	case limit < 0 || limit > maxAuditLimit:
		return a.toStatus(&registry.ValidationError{Field: "limit", Problem: "must be 1 to 100000; 0 means 1000"})
	case limit == 0:
		limit = defaultAuditLimit
	}
	if len(req.Events) > maxAuditEvents {
		return a.toStatus(&registry.ValidationError{Field: "events", Problem: "at most 64 are allowed"})
	}
	var f auditlog.Filter
	if req.Since != nil {
		f.Since = req.Since.AsTime()
	}
	if req.Until != nil {
		f.Until = req.Until.AsTime()
	}
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	go func() {
		select {
		case <-a.c.Stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := a.searchAudit(ctx, req, s, f, limit)
	select {
	case <-a.c.Stop:
		return status.Error(codes.Unavailable, "the CA is shutting down")
	default:
	}
	return a.toStatus(err)
}

func (a *API) searchAudit(ctx context.Context, req *adminv1.SearchAuditRequest, s grpc.ServerStreamingServer[adminv1.AuditRecord], f auditlog.Filter, limit int) error {
	send := func(r auditlog.Record) error {
		line, err := auditJSON(r)
		if err != nil {
			return err
		}
		return s.Send(&adminv1.AuditRecord{Json: line})
	}
	// The newest of the past: a ring of the last ones, since the log is read oldest first.
	past := make([]auditlog.Record, 0, min(limit, 1024))
	// What comes between the search and the following is not lost: following begins where the search began at least.
	next, last := 0, a.c.Audit.Checkpoint().Seq
	err := a.c.Audit.Search(ctx, f, func(r auditlog.Record) error {
		last = max(last, r.Seq)
		switch {
		case !wanted(req, r):
		case len(past) < limit:
			past = append(past, r)
		default:
			past[next] = r
			next = (next + 1) % limit
		}
		return nil
	})
	damaged := errors.Is(err, auditlog.ErrMalformed)
	if err != nil && !damaged {
		return err
	}
	for i := range past {
		if err := send(past[(next+i)%len(past)]); err != nil {
			return err
		}
	}
	if damaged { // after what can be read: it is what somebody looks for after an incident
		return status.Error(codes.DataLoss, err.Error())
	}
	if !req.Follow {
		return nil
	}
	f.AfterSeq = last
	return a.c.Audit.Follow(ctx, f, func(r auditlog.Record) error {
		if !wanted(req, r) {
			return nil
		}
		return send(r)
	})
}
