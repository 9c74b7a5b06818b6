package etcd

import (
	"context"
	"fmt"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/signet-id/signet/ca/store"
)

// maxRemovalTries bounds how often a commit that may remove nothing is begun anew because others commit meanwhile.
const maxRemovalTries = 64

// Commit implements store.Store.
//
// No request that writes is sent twice: one whose answer was lost may still be in the buffers of a member that hangs, and take
// effect when it wakes up. The caller, who knows what the writes mean, reads again.
func (s *Store) Commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	if err := store.CheckCommit(checks, writes); err != nil {
		return 0, err
	}
	var rev store.Revision
	err := s.call(ctx, func(ctx context.Context) (err error) {
		if changesNothing, err := s.removalsOnly(ctx, checks, writes, &rev); changesNothing || err != nil {
			return err
		}
		if len(writes) == 0 {
			rev, err = s.ask(ctx, checks, nil)
			return err
		}
		rev, err = s.write(ctx, checks, writes)
		return err
	})
	if err != nil {
		return 0, err
	}
	return rev, nil
}

// write makes the transaction of a commit that changes something.
func (s *Store) write(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	size := 0
	var ops []clientv3.Op
	for _, w := range writes {
		if w.Delete {
			ops = append(ops, clientv3.OpDelete(s.itemKey(w.Key)))
			continue
		}
		value := seal(itemSpace+w.Key, w.Value)
		ops = append(ops, clientv3.OpPut(s.itemKey(w.Key), value))
		size += len(w.Key) + len(value)
	}
	if size > 0 {
		if err := s.room.take(ctx, size); err != nil {
			return 0, err
		}
	}
	m := mark{Nonce: randomName()}
	ops = append(ops, clientv3.OpPut(s.key(markKey), seal(markKey, []byte(m.Nonce)), clientv3.WithPrevKV()))
	before := s.history.known()
	rsp, err := s.client.Txn(ctx).If(s.compares(checks)...).Then(ops...).Else(s.looks(checks)...).Commit()
	if err != nil {
		full := s.mapped(ctx, err)
		if !isFull(full) {
			return 0, err
		}
		s.room.spent()
		rev, landed, err := s.landed(ctx, m.Nonce, before)
		if err != nil || landed {
			return rev, err
		}
		return 0, full
	}
	if err := s.checkCluster(rsp.Header); err != nil {
		return 0, err
	}
	if !rsp.Succeeded {
		return 0, s.conflict(checks, rsp.Responses)
	}
	// The commit before this one tells whether the history is still the one that was known when this one was sent.
	prev := rsp.Responses[len(ops)-1].GetResponsePut().PrevKv
	if prev == nil {
		return 0, s.fail(fmt.Errorf("%w: %q was removed below %s", ErrHistory, markKey, s.c.Prefix))
	}
	last, err := s.parseMark([]*kv{prev})
	if err != nil {
		return 0, err
	}
	if err := s.checkMark(last, before); err != nil {
		return 0, err
	}
	m.Revision = store.Revision(rsp.Header.Revision)
	s.history.learn(m)
	return m.Revision, nil
}

// maxMarksBack bounds how many commits landed looks at.
const maxMarksBack = 100

// landed tells whether a transaction that etcd answered with an error, for good, took effect all the same: what it was just proposing
// when it came over its quota it carries out, and answers that there is no space. Our mark is then among those after before.
func (s *Store) landed(ctx context.Context, nonce string, before mark) (store.Revision, bool, error) {
	m, err := s.newest(ctx)
	for range maxMarksBack {
		if err != nil {
			return 0, false, err
		}
		if m.Nonce == nonce {
			return m.Revision, true, nil
		}
		if m.Revision <= before.Revision {
			return 0, false, nil
		}
		rsp, err := s.client.Get(ctx, s.key(markKey), clientv3.WithRev(int64(m.Revision)-1))
		if err != nil {
			return 0, false, err
		}
		if len(rsp.Kvs) == 0 {
			return 0, false, nil
		}
		if m, err = s.parseMark(rsp.Kvs); err != nil {
			return 0, false, err
		}
	}
	return 0, false, fmt.Errorf("%w: etcd is over its quota, and too many commits followed to tell whether this one took effect", store.ErrUnavailable)
}

// ask makes the transaction of a commit without writes: it returns the newest revision if the checks hold. moved, if it is not
// nil, is a mark that must still be the newest; otherwise ask returns revision 0.
func (s *Store) ask(ctx context.Context, checks []store.Check, moved *mark) (store.Revision, error) {
	compares := s.compares(checks)
	if moved != nil {
		compares = append(compares, clientv3.Compare(clientv3.ModRevision(s.key(markKey)), "=", int64(moved.Revision)))
	}
	before := s.history.known()
	rsp, err := s.client.Txn(ctx).If(compares...).Then(clientv3.OpGet(s.key(markKey))).Else(s.looks(checks)...).Commit()
	if err != nil {
		return 0, err
	}
	if err := s.checkCluster(rsp.Header); err != nil {
		return 0, err
	}
	if !rsp.Succeeded {
		err := s.conflict(checks, rsp.Responses)
		if moved != nil && err == errNoConflict {
			return 0, nil
		}
		return 0, err
	}
	m, err := s.parseMark(rsp.Responses[0].GetResponseRange().Kvs)
	if err != nil {
		return 0, err
	}
	return m.Revision, s.checkMark(m, before)
}

// removalsOnly deals with commits that remove keys and do nothing else. They make no revision if none of the keys exists, which
// etcd's transactions cannot say together with our checks: so it is asked first, and what was found out is checked too.
func (s *Store) removalsOnly(ctx context.Context, checks []store.Check, writes []store.Write, rev *store.Revision) (done bool, err error) {
	if len(writes) == 0 {
		return false, nil
	}
	for _, w := range writes {
		if !w.Delete {
			return false, nil
		}
	}
	for _, c := range checks {
		for _, w := range writes {
			if c.Key == w.Key && c.Modified > 0 {
				return false, nil // it exists, or the check fails
			}
		}
	}
	for range maxRemovalTries {
		ops := []clientv3.Op{clientv3.OpGet(s.key(markKey))}
		for _, w := range writes {
			ops = append(ops, clientv3.OpGet(s.itemKey(w.Key), clientv3.WithKeysOnly()))
		}
		before := s.history.known()
		rsp, err := s.client.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return true, err
		}
		m, err := s.parseMark(rsp.Responses[0].GetResponseRange().Kvs)
		if err != nil {
			return true, err
		}
		if err := s.checkMark(m, before); err != nil {
			return true, err
		}
		var exists *store.Check
		for i, w := range writes {
			if kvs := rsp.Responses[i+1].GetResponseRange().Kvs; len(kvs) > 0 {
				exists = &store.Check{Key: w.Key, Modified: store.Revision(kvs[0].ModRevision)}
				break
			}
		}
		if exists == nil {
			if *rev, err = s.ask(ctx, checks, &m); err != nil || *rev > 0 {
				return true, err
			}
			continue
		}
		*rev, err = s.write(ctx, append(checks[:len(checks):len(checks)], *exists), writes)
		if c, ok := err.(*store.ConflictError); !ok || c.Key != exists.Key || slices.ContainsFunc(checks, func(c store.Check) bool { return c.Key == exists.Key }) {
			return true, err
		}
	}
	return true, fmt.Errorf("%w: other commits came between %d times", store.ErrUnavailable, maxRemovalTries)
}

// compares are the checks as etcd makes them, and that the history is the one this store was opened on.
func (s *Store) compares(checks []store.Check) []clientv3.Cmp {
	out := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(s.key(epochKey)), "=", s.history.epochMod)}
	for _, c := range checks {
		// Of a key that does not exist the revision is 0.
		out = append(out, clientv3.Compare(clientv3.ModRevision(s.itemKey(c.Key)), "=", int64(c.Modified)))
	}
	return out
}

// looks ask, when a check does not hold, for what is there instead.
func (s *Store) looks(checks []store.Check) []clientv3.Op {
	out := []clientv3.Op{clientv3.OpGet(s.key(epochKey), clientv3.WithKeysOnly())}
	for _, c := range checks {
		out = append(out, clientv3.OpGet(s.itemKey(c.Key), clientv3.WithKeysOnly()))
	}
	return out
}

// errNoConflict says that every check holds.
var errNoConflict = fmt.Errorf("%w: etcd refused a transaction although its checks hold", store.ErrUnavailable)

// conflict names the first check that does not hold, from the answers to looks.
func (s *Store) conflict(checks []store.Check, found []*pb.ResponseOp) error {
	modified := func(i int) int64 {
		if kvs := found[i].GetResponseRange().Kvs; len(kvs) > 0 {
			return kvs[0].ModRevision
		}
		return 0
	}
	if modified(0) != s.history.epochMod {
		return s.fail(fmt.Errorf("%w: the store has a new epoch, which another replica gave it", ErrHistory))
	}
	for i, c := range checks {
		if modified(i+1) != int64(c.Modified) {
			return &store.ConflictError{Key: c.Key}
		}
	}
	return errNoConflict
}
