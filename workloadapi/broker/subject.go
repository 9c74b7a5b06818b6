package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi"
)

const (
	// podLook is how long a pod is believed to exist; then the kubelet is asked again, so that streams end soon after it. All
	// streams ask at the same moment, which costs the kubelet one answer.
	podLook = 2 * time.Second

	// podTimeout bounds one look.
	podTimeout = 5 * time.Second

	// noUID is the user of workloads that are no process. Linux gives it to nobody.
	noUID = math.MaxUint32
)

// ErrNoPod says that there is no such pod on this node: none of that name, or it has another UID.
var ErrNoPod = errors.New("there is no such pod on this node")

// A PodReference names a pod by namespace and name, by UID, or by both, which must then agree.
type PodReference struct{ Namespace, Name, UID string }

// String is for logs and messages.
func (r PodReference) String() string {
	switch {
	case r.Name == "":
		return "pod " + r.UID
	case r.UID == "":
		return "pod " + r.Namespace + "/" + r.Name
	}
	return "pod " + r.Namespace + "/" + r.Name + " " + r.UID
}

// A Pod is one that runs on this node.
type Pod struct {
	// UID is the one that Kubernetes gave it, in lower case.
	UID string

	// Selectors are what the kubelet says of the pod as a whole, nothing that holds for one of its containers alone.
	Selectors []spiffe.Selector

	// Incomplete says that some selectors could not be found out. The others count, but that some are missing does not mean
	// that the pod has changed.
	Incomplete bool
}

// Pods knows the pods of this node, from the kubelet and not from whoever asks. It is called concurrently, and for each
// open stream every few seconds.
type Pods interface {
	// Pod returns the pod that ref names. The error is ErrNoPod if the kubelet has none such; any other means that the
	// kubelet could not be asked.
	Pod(ctx context.Context, ref PodReference) (Pod, error)
}

// A podSubject is the pod that a broker speaks for. Its UID is pinned when it is looked up first, so that another pod
// that gets the name is not taken for it.
type podSubject struct {
	pods Pods
	ref  PodReference // with the UID, always
	log  *slog.Logger

	gone     chan struct{}
	goneOnce sync.Once
	cancel   context.CancelFunc
	watching sync.WaitGroup
}

// findPod looks the pod up and begins to watch whether it exists. Close ends that.
func findPod(ctx context.Context, pods Pods, ref PodReference, log *slog.Logger) (*podSubject, error) {
	s := &podSubject{pods: pods, ref: ref, log: log, gone: make(chan struct{})}
	pod, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	s.ref.UID = pod.UID
	watch, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	s.watching.Go(func() { s.watch(watch) })
	return s, nil
}

func (s *podSubject) Close() {
	s.cancel()
	s.watching.Wait()
}

func (s *podSubject) Done() <-chan struct{} { return s.gone }

// look asks for the pod. That it does not exist any more is told to Done, too.
func (s *podSubject) look(ctx context.Context) (Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	pod, err := s.pods.Pod(ctx, s.ref)
	switch {
	case errors.Is(err, ErrNoPod):
	case err != nil:
		return Pod{}, fmt.Errorf("%w: looking for %s: %w", errNoKubelet, s.ref, err)
	case pod.UID == "":
		return Pod{}, fmt.Errorf("%w: %s has no UID", errNoKubelet, s.ref)
	case s.ref.UID == "" || pod.UID == s.ref.UID:
		return pod, nil
	}
	s.goneOnce.Do(func() { close(s.gone) })
	return Pod{}, fmt.Errorf("%s: %w", s.ref, ErrNoPod)
}

// watch asks again and again until the pod is gone or ctx ends.
func (s *podSubject) watch(ctx context.Context) {
	timer := time.NewTimer(untilNextLook())
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		_, err := s.look(ctx)
		switch {
		case errors.Is(err, ErrNoPod):
			return
		case err != nil && ctx.Err() == nil:
			s.log.LogAttrs(ctx, slog.LevelDebug, "whether a pod still exists is not known", slog.String("pod", s.ref.String()), slog.Any("err", err))
		}
		timer.Reset(untilNextLook())
	}
}

func untilNextLook() time.Duration { return time.Until(time.Now().Truncate(podLook).Add(podLook)) }

// Attest says what the kubelet says of the pod.
func (s *podSubject) Attest(ctx context.Context) (workloadapi.Caller, error) {
	pod, err := s.look(ctx)
	if err != nil {
		return workloadapi.Caller{}, err
	}
	return workloadapi.Caller{UID: noUID, GID: noUID, Selectors: sorted(pod.Selectors)}, nil
}

// Check says whether the pod exists and is as it was.
func (s *podSubject) Check(ctx context.Context, c workloadapi.Caller) error {
	pod, err := s.look(ctx)
	if err != nil {
		return err
	}
	if !pod.Incomplete && !slices.Equal(sorted(pod.Selectors), c.Selectors) {
		return workloadapi.ErrSubjectChanged
	}
	return nil
}

func sorted(selectors []spiffe.Selector) []spiffe.Selector {
	out := slices.Clone(selectors)
	slices.SortFunc(out, func(a, b spiffe.Selector) int {
		if a.String() < b.String() {
			return -1
		}
		if a != b {
			return 1
		}
		return 0
	})
	return slices.Compact(out)
}
