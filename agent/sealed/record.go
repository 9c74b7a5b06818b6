package sealed

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
)

// A recordKey names one thing that is kept: its kind and its id within the kind.
type recordKey struct {
	kind byte
	id   string
}

// The kinds of records. Those of the CA are messages as it sent them, with the fields that this program does not know. A
// program that meets a kind it does not know refuses the cache as a whole: what it cannot read may be a revocation.
const (
	kindState  = 'm' // a FollowResponse that has epoch, revision, defaults and position only
	kindEntry  = 'e' // by entry id
	kindPolicy = 'p' // by name
	kindBundle = 'b' // by trust domain
	kindSVID   = 's' // by entry id

	kindRevocation = 'r' // by name
	kindCRL        = 'c' // by authority id
	kindUserIssuer = 'u' // by name
)

var kinds = []byte{kindState, kindEntry, kindPolicy, kindBundle, kindSVID, kindRevocation, kindCRL, kindUserIssuer}

// The operations of records.
const (
	opRemove = 0
	opPut    = 1
)

// records are what a cache holds.
type records map[recordKey][]byte

// appendRecord appends a record to a frame; without a value it removes.
func appendRecord(out []byte, k recordKey, value []byte) []byte {
	op := byte(opPut)
	if value == nil {
		op = opRemove
	}
	out = append(out, op, k.kind)
	out = binary.AppendUvarint(out, uint64(len(k.id)))
	out = append(out, k.id...)
	if value != nil {
		out = binary.AppendUvarint(out, uint64(len(value)))
		out = append(out, value...)
	}
	return out
}

// take applies a frame.
func (r records) take(plain []byte) error {
	in := reader{data: plain}
	for in.at < len(plain) {
		head := in.take(2)
		if in.failed {
			return errors.New("a record is cut off")
		}
		n := in.uvarint()
		if n > maxKeyBytes {
			return fmt.Errorf("an id has %d bytes, more than the %d allowed", n, maxKeyBytes)
		}
		k := recordKey{kind: head[1], id: string(in.take(n))}
		if !slices.Contains(kinds, k.kind) {
			return fmt.Errorf("there is no kind %q of records", k.kind)
		}
		switch head[0] {
		case opRemove:
			delete(r, k)
		case opPut:
			value := in.take(in.uvarint())
			if !in.failed {
				r[k] = append([]byte{}, value...)
			}
		default:
			return fmt.Errorf("there is no operation %d of records", head[0])
		}
		if in.failed {
			return errors.New("a record is cut off")
		}
	}
	return nil
}

// An SVID is an X509-SVID with its key.
type SVID struct {
	EntryID       string
	EntryRevision int64
	// Used says that somebody has asked for it.
	Used bool
	// Chain is concatenated DER, leaf first; Key is PKCS#8 DER.
	Chain, Key []byte
}

func (s *SVID) encode() []byte {
	out := binary.AppendUvarint(make([]byte, 0, 33+len(s.Chain)+len(s.Key)), uint64(s.EntryRevision))
	used := byte(0)
	if s.Used {
		used = 1
	}
	out = append(out, used)
	out = binary.AppendUvarint(out, uint64(len(s.Chain)))
	out = append(out, s.Chain...)
	out = binary.AppendUvarint(out, uint64(len(s.Key)))
	return append(out, s.Key...)
}

func decodeSVID(entryID string, value []byte) (SVID, error) {
	s := SVID{EntryID: entryID}
	revision, n := binary.Uvarint(value)
	if n <= 0 || revision > 1<<63-1 {
		return SVID{}, errors.New("an SVID has no revision")
	}
	s.EntryRevision = int64(revision)
	in := reader{data: value, at: n}
	used := in.take(1)
	if in.failed || used[0] > 1 {
		return SVID{}, errors.New("an SVID is cut off")
	}
	s.Used = used[0] == 1
	s.Chain = in.take(in.uvarint())
	s.Key = in.take(in.uvarint())
	if in.failed || in.at != len(value) {
		return SVID{}, errors.New("an SVID is cut off")
	}
	return s, nil
}

var deterministic = proto.MarshalOptions{Deterministic: true}

// fold brings what a message of Follow says into records: the whole of a snapshot, which replaces what was there, or
// differences. defaults and position are those after it, of which a message is silent that does not change them. weighty
// says that it is more than another revision.
func fold(m *nodev1.FollowResponse, defaults *policyv1.DefaultsMode, position *nodev1.Position) (changes records, weighty bool, err error) {
	changes = make(records)
	put := func(kind byte, id string, m proto.Message) {
		value, marshalErr := deterministic.Marshal(m)
		if marshalErr == nil && len(value) > maxValueBytes {
			marshalErr = fmt.Errorf("it has %d bytes, more than the %d allowed", len(value), maxValueBytes)
		}
		if marshalErr == nil && len(id) > maxKeyBytes {
			marshalErr = fmt.Errorf("its id has %d bytes, more than the %d allowed", len(id), maxKeyBytes)
		}
		if marshalErr != nil {
			err = errors.Join(err, fmt.Errorf("a record of kind %q: %w", kind, marshalErr))
			return
		}
		changes[recordKey{kind, id}] = value
	}
	for _, id := range m.GetRemovedEntryIds() {
		changes[recordKey{kindEntry, id}] = nil
	}
	for _, name := range m.GetRemovedPolicies() {
		changes[recordKey{kindPolicy, name}] = nil
	}
	for _, td := range m.GetRemovedBundles() {
		changes[recordKey{kindBundle, td}] = nil
	}
	for _, name := range m.GetRemovedRevocations() {
		changes[recordKey{kindRevocation, name}] = nil
	}
	for _, id := range m.GetRemovedCrls() {
		changes[recordKey{kindCRL, id}] = nil
	}
	for _, name := range m.GetRemovedUserIssuers() {
		changes[recordKey{kindUserIssuer, name}] = nil
	}
	for _, e := range m.GetEntries() {
		put(kindEntry, e.GetId(), e)
	}
	for _, p := range m.GetPolicies() {
		put(kindPolicy, p.GetName(), p)
	}
	for _, b := range m.GetBundles() {
		put(kindBundle, b.GetTrustDomain(), b)
	}
	for _, r := range m.GetRevocations() {
		put(kindRevocation, r.GetName(), r)
	}
	for _, c := range m.GetCrls() {
		put(kindCRL, c.GetAuthorityId(), c)
	}
	for _, u := range m.GetUserIssuers() {
		put(kindUserIssuer, u.GetName(), u)
	}
	weighty = len(changes) > 0 || m.GetSnapshot() || m.PolicyDefaults != nil
	put(kindState, "", &nodev1.FollowResponse{Format: m.GetFormat(), Epoch: m.GetEpoch(), To: m.GetTo(), PolicyDefaults: defaults, Position: position})
	return changes, weighty, err
}

// unfold makes the snapshot and the SVIDs of what is held.
func (r records) unfold() (*nodev1.FollowResponse, []SVID, error) {
	state, ok := r[recordKey{kindState, ""}]
	if !ok {
		return nil, nil, errors.New("it holds no state")
	}
	m := &nodev1.FollowResponse{}
	if err := proto.Unmarshal(state, m); err != nil {
		return nil, nil, fmt.Errorf("the state: %w", err)
	}
	m = &nodev1.FollowResponse{Format: m.GetFormat(), Epoch: m.GetEpoch(), To: m.GetTo(), PolicyDefaults: m.PolicyDefaults, Position: m.Position, Snapshot: true, Complete: true}
	var svids []SVID
	for k, value := range r {
		var err error
		switch k.kind {
		case kindEntry:
			e := &nodev1.Entry{}
			err = proto.Unmarshal(value, e)
			m.Entries = append(m.Entries, e)
		case kindPolicy:
			p := &policyv1.Policy{}
			err = proto.Unmarshal(value, p)
			m.Policies = append(m.Policies, p)
		case kindBundle:
			b := &nodev1.Bundle{}
			err = proto.Unmarshal(value, b)
			m.Bundles = append(m.Bundles, b)
		case kindRevocation:
			one := &policyv1.Revocation{}
			err = proto.Unmarshal(value, one)
			m.Revocations = append(m.Revocations, one)
		case kindCRL:
			c := &nodev1.CRL{}
			err = proto.Unmarshal(value, c)
			m.Crls = append(m.Crls, c)
		case kindUserIssuer:
			u := &policyv1.UserIssuer{}
			err = proto.Unmarshal(value, u)
			m.UserIssuers = append(m.UserIssuers, u)
		case kindSVID:
			var s SVID
			s, err = decodeSVID(k.id, value)
			svids = append(svids, s)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("record %q: %w", k.kind, err)
		}
	}
	return m, svids, nil
}

// replacedBySnapshot are the kinds of which a snapshot names all there are.
func replacedBySnapshot(kind byte) bool {
	return kind != kindSVID && kind != kindState
}
