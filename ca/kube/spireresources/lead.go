package spireresources

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/internal/strictyaml"
)

const (
	// resync is how often the leader looks when nothing seems to have changed: the store has other writers.
	resync             = 10 * time.Minute
	minRetry, maxRetry = time.Second, time.Minute
)

// source is whose the entries and relationships are.
func (r *Reader) source() string { return Source(r.c.Client.Cluster) }

// Source is the owner of what the resources of a cluster make in the registry.
func Source(cluster string) string { return "kubernetes/" + cluster + "/spire" }

// Lead writes what the resources say to the store, and what became of them to their status, until ctx ends. One replica does.
func (r *Reader) Lead(ctx context.Context) error {
	retry := minRetry
	w := newStatusWriter(r)
	var g sync.WaitGroup
	defer g.Wait()
	if r.c.reads(KindClusterSPIFFEID) {
		g.Go(func() { w.follower().Run(ctx) })
	}
	next := time.Duration(0)
	for {
		if next > 0 {
			t := time.NewTimer(next)
			select {
			case <-ctx.Done():
				t.Stop()
				return nil
			case <-r.leading:
			case <-t.C:
			}
			t.Stop()
		}
		if !pause(ctx, settle) {
			return nil
		}
		entries, err := r.writeEntries(ctx)
		err = errors.Join(err, r.writeDomains(ctx), w.write(ctx, entries))
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			r.c.Log.Warn("the resources of spire-controller-manager could not all be followed; trying again", "cluster", r.c.Client.Cluster, "err", clip(err))
			next = retry/2 + rand.N(retry)
			retry = min(2*retry, maxRetry)
		default:
			next, retry = r.c.StatusEvery, minRetry
			if !r.c.reads(KindClusterSPIFFEID) {
				next = resync
			}
		}
	}
}

// audited makes a change with a record before it and one after it. A change that cannot be recorded is not made.
func (r *Reader) audited(ctx context.Context, event, subject string, details map[string]any, change func() error) error {
	details["owner"] = r.source()
	record := func(event, outcome string) auditlog.Record {
		return auditlog.Record{Time: r.c.Now(), Event: event, Actor: r.c.Actor, ActorKind: "system", Subject: subject, Outcome: outcome, Details: details}
	}
	if err := r.c.Audit(ctx, record(event+".begin", auditlog.Done)); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	err := change()
	outcome := auditlog.Done
	if err != nil {
		outcome, details["reason"] = auditlog.Failed, clip(err).Error()
	}
	if err := r.c.Audit(context.WithoutCancel(ctx), record(event, outcome)); err != nil {
		r.c.Log.Error("audit of an outcome; its begin record is in the log", "event", event, "err", err)
	}
	return err
}

// entryStatus is the status of a ClusterStaticEntry.
type entryStatus struct {
	Rendered bool `json:"rendered"`
	Masked   bool `json:"masked"`
	Set      bool `json:"set"`
	// Problem says what is wrong, if something is.
	problem string
}

// writeEntries makes the entries of the ClusterStaticEntries hold, and removes those whose resource is gone. It returns the
// statuses by name of which something is known.
func (r *Reader) writeEntries(ctx context.Context) (map[string]entryStatus, error) {
	if !r.c.reads(KindClusterStaticEntry) {
		return nil, nil
	}
	all, _, known := r.entries.all()
	if !known {
		return nil, nil
	}
	oldest(all, metaOfEntry)
	out := map[string]entryStatus{}
	kept, made := map[registry.EntryID]bool{}, map[string]bool{}
	var errs []error
	for _, s := range all {
		if !r.c.mine(s.spec.ClassName) {
			continue
		}
		if s.err != nil {
			out[s.meta.Name] = entryStatus{problem: s.err.Error()}
			continue
		}
		key := s.key()
		if made[key] {
			out[s.meta.Name] = entryStatus{Rendered: true, Masked: true}
			continue
		}
		made[key] = true
		st := entryStatus{Rendered: true}
		e, err := r.setEntry(ctx, s)
		switch _, exists := errors.AsType[*registry.ExistsError](err); {
		case err == nil:
			st.Set = true
			kept[e.ID] = true
		case exists:
			st.Masked, st.problem = true, err.Error()
		case invalid(err):
			st.problem = err.Error()
		default:
			errs = append(errs, fmt.Errorf("ClusterStaticEntry %s: %w", s.meta.Name, err))
			if !full(err) {
				continue // soon it is known; until then the status stays
			}
			st.problem = "the CA's disk is full; the entry is made, or changed, by itself once there is room again"
		}
		out[s.meta.Name] = st
	}
	if ctx.Err() != nil || len(errs) > 0 { // what could not be looked at is not taken away
		return out, errors.Join(errs...)
	}
	for _, e := range r.c.Registry.OwnedEntries(r.source()) {
		if kept[e.ID] {
			continue
		}
		err := r.audited(ctx, "entry.delete", e.SPIFFEID.String(), map[string]any{"entry_id": string(e.ID), "resource": e.Owner}, func() error {
			return r.c.Registry.DeleteOwned(ctx, r.source(), e.ID)
		})
		if err != nil {
			errs = append(errs, err)
		}
	}
	return out, errors.Join(errs...)
}

func invalid(err error) bool {
	_, is := errors.AsType[*registry.ValidationError](err)
	return is
}

// full tells whether an error is that there is no room for anything new, which may last.
func full(err error) bool {
	return errors.Is(err, store.ErrDiskFull) || errors.Is(err, auditlog.ErrDisk)
}

func metaOfEntry(s *staticEntry) *metav1.ObjectMeta { return &s.meta }

// key says what makes two entries the same registration.
func (s *staticEntry) key() string {
	key := s.entry.SPIFFEID.String() + "\x00" + s.entry.ParentID.String()
	for _, sel := range sortedSelectors(s.entry.Selectors) {
		key += "\x00" + sel
	}
	return key
}

func (r *Reader) setEntry(ctx context.Context, s *staticEntry) (e *registry.Entry, err error) {
	name := KindClusterStaticEntry + "/" + s.meta.Name
	if have := r.c.Registry.HoldsOwned(r.source(), name, s.entry); have != nil {
		return have, nil
	}
	err = r.audited(ctx, "entry.create", s.entry.SPIFFEID.String(), map[string]any{"parent_id": s.entry.ParentID.String(), "selectors": sortedSelectors(s.entry.Selectors),
		"admin": s.entry.Admin, "downstream": s.entry.Downstream, "resource": name}, func() error {
		e, _, err = r.c.Registry.SetOwned(ctx, r.source(), name, s.entry)
		return err
	})
	return e, err
}

// federationDocument is the Federation that a ClusterFederatedTrustDomain stands for.
type federationDocument struct {
	Kind              string `json:"kind"`
	Name              string `json:"name"`
	TrustDomain       string `json:"trustDomain"`
	BundleEndpointURL string `json:"bundleEndpointURL"`
	Profile           string `json:"profile"`
	EndpointSPIFFEID  string `json:"endpointSPIFFEID,omitempty"`
	Bundle            string `json:"bundle,omitempty"`
}

// writeDomains makes the relationships of the ClusterFederatedTrustDomains hold, and ends those whose resource is gone. One that is
// refused does not keep the others back, and what is there for its trust domain stays.
func (r *Reader) writeDomains(ctx context.Context) error {
	if !r.c.reads(KindClusterFederatedTrustDomain) {
		return nil
	}
	all, _, known := r.domains.all()
	if !known {
		return nil
	}
	oldest(all, func(f *federatedTrustDomain) *metav1.ObjectMeta { return &f.meta })
	owned := r.c.Registry.Owned(r.source())
	wanted, taken := map[registry.Ref]bool{}, map[string]bool{}
	var errs []error
	for _, f := range all {
		if !r.c.mine(f.spec.ClassName) {
			continue
		}
		if f.err != nil {
			r.refused(KindClusterFederatedTrustDomain, f.meta.Name, f.err)
			continue
		}
		if taken[f.td.Name()] {
			r.refused(KindClusterFederatedTrustDomain, f.meta.Name, fmt.Errorf("an older resource is for the trust domain %s", f.td.Name()))
			continue
		}
		taken[f.td.Name()] = true
		doc, err := r.document(f)
		if err != nil {
			return err
		}
		ref := registry.Ref{Kind: registry.KindFederation, Name: federationName(r.c.Client.Cluster, f)}
		wanted[ref] = true
		docs, o := []strictyaml.Document{doc}, registry.Options{Owner: r.source(), TakesOver: true} // the controller made them by the API
		p, err := r.c.Registry.Plan(docs, o)
		switch {
		case errors.Is(err, registry.ErrConflict), errors.Is(err, registry.ErrNotReady):
			errs = append(errs, err)
			continue
		case err != nil:
			r.refused(KindClusterFederatedTrustDomain, f.meta.Name, err)
			continue
		}
		if slices.ContainsFunc(p.Changes, func(c registry.PlannedChange) bool { return c.Action != registry.Unchanged }) {
			if err := r.c.Apply(ctx, docs, o, func(registry.Ref) string { return doc.File }); err != nil { // of the moment: nothing is wrong with it
				errs = append(errs, fmt.Errorf("%s: %w", doc.File, err))
				continue
			}
		}
		r.accepted(KindClusterFederatedTrustDomain, f.meta.Name)
	}
	var gone []registry.Ref
	for ref := range owned {
		if ref.Kind == registry.KindFederation && !wanted[ref] {
			gone = append(gone, ref)
		}
	}
	for chunk := range slices.Chunk(gone, registry.MaxDocuments/2) {
		err := r.c.Apply(ctx, nil, registry.Options{Owner: r.source(), Delete: chunk}, func(ref registry.Ref) string { return owned[ref].Document.File })
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// federationName is by trust domain, so that a resource that is made anew under another name is the same relationship.
func federationName(cluster string, f *federatedTrustDomain) string {
	return shortName("spire." + cluster + "." + f.td.Name())
}

// shortName keeps a name within the 200 characters that a document's may have.
func shortName(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	return s[:most-17] + "-" + hex.EncodeToString(sum[:8])
}

func (r *Reader) document(f *federatedTrustDomain) (strictyaml.Document, error) {
	text, err := json.Marshal(federationDocument{registry.KindFederation, federationName(r.c.Client.Cluster, f), f.td.Name(), f.spec.BundleEndpointURL, f.spec.BundleEndpointProfile.Type,
		f.spec.BundleEndpointProfile.EndpointSPIFFEID, f.spec.TrustDomainBundle})
	if err != nil {
		return strictyaml.Document{}, err
	}
	docs, err := strictyaml.Split(text, fmt.Sprintf("%s/%s/%s", r.source(), KindClusterFederatedTrustDomain, f.meta.Name), 1)
	if err != nil {
		return strictyaml.Document{}, err
	}
	return docs[0], nil
}
