// Package podcert signs Pod Certificates: it answers the PodCertificateRequests that the kubelets of a cluster make for
// pods with a podCertificate volume of the signer signet-id.github.io/x509-svid, by the X509-SVID of the pod. Which SPIFFE
// ID a pod has, rules of operators say, as they do for agents; a request can choose among the pod's IDs and nothing else.
// It believes a request only as far as it agrees with what the CA has seen of the pod itself, and it never touches requests for
// other signers. [docs/decisions/0040]
package podcert

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/util/workqueue"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/ca/kube/follow"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
)

// SignerName is the signer that pods name in a podCertificate volume.
const SignerName = kube.SignerName

// MinLifetime is the shortest that the API lets a Pod Certificate last, from its notBefore to its notAfter.
const MinLifetime = time.Hour

const (
	// workers is how many requests are answered at once.
	workers = 8
	// answerTime bounds the answer to one request.
	answerTime = 30 * time.Second
	// firstRetry and maxRetry bound the waits between the tries of one request, which jitter.
	firstRetry = 200 * time.Millisecond
	maxRetry   = 15 * time.Second
	// patience is how long a request waits for what may still come, such as the CA's own sight of the pod, before it is denied,
	// and patientTries how often it was looked at by then. A kubelet never asks again for a pod whose request was denied.
	patience     = 2 * time.Minute
	patientTries = 4
)

// Pods knows the pods that the CA has seen, and which registration entries they stand for. Its methods may be called
// concurrently. The Expander of package pods is one.
type Pods interface {
	// Pod returns the pod with the UID, or nil if it is not known.
	Pod(cluster, uid string) *pods.Pod
	// Entries returns what the pod stands for at this moment.
	Entries(cluster, uid string) []*registry.Entry
	// IsSynced tells whether all pods of the cluster are known.
	IsSynced(cluster string) bool
}

// Requests are the PodCertificateRequests at an API server.
type Requests interface {
	List(ctx context.Context, o metav1.ListOptions) (*certificatesv1beta1.PodCertificateRequestList, error)
	Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
	UpdateStatus(ctx context.Context, r *certificatesv1beta1.PodCertificateRequest, o metav1.UpdateOptions) (*certificatesv1beta1.PodCertificateRequest, error)
}

// Config is what a Signer works with. All fields are needed but those that say otherwise.
type Config struct {
	// Cluster is the cluster's name in the CA's configuration.
	Cluster string
	// Requests are those of a namespace; of all, if it is empty.
	Requests func(namespace string) Requests
	Pods     Pods

	TrustDomain spiffeid.TrustDomain
	Authority   *authority.Set
	Registry    *registry.Registry
	Audit       *auditlog.Log

	// TTL is how long an SVID lasts whose entry has no TTL; the API makes it an hour at least.
	TTL time.Duration
	// Agents returns the attested agents of a node. What is revoked with them is revoked with the node.
	Agents func(nodeUID string) []*registry.Node
	// Canary is told of an SVID for an ID that nobody should ever hold. Nil: nobody is.
	Canary func(ctx context.Context, id spiffeid.ID, kind, who, address string)
	// Issued counts SVIDs, as those of the doors are counted.
	Issued func(kind, outcome string, n int)

	Now func() time.Time
	Log *slog.Logger
}

// A Signer answers the requests of one cluster.
type Signer struct {
	c     Config
	rates *rates

	// What follows is made by Run.
	tries   atomic.Pointer[jittered]
	queue   workqueue.TypedRateLimitingInterface[types.NamespacedName]
	waiting *waiting
}

// New returns a signer that does nothing before Run.
func New(c Config) *Signer { return &Signer{c: c, rates: newRates(c.Now)} }

// Run answers requests until ctx ends. While the API server is away, or does not know Pod Certificates, it waits. It may be
// called again after it returned, but not twice at the same time.
func (s *Signer) Run(ctx context.Context) error {
	tries := &jittered{workqueue.NewTypedItemExponentialFailureRateLimiter[types.NamespacedName](firstRetry, maxRetry)}
	s.tries.Store(tries)
	s.queue = workqueue.NewTypedRateLimitingQueue[types.NamespacedName](tries)
	s.waiting = newWaiting(s.queue, s.whose, s.full())
	ours := fields.OneTermEqualSelector("spec.signerName", SignerName).String()
	requests := s.c.Requests("")
	f := follow.New(follow.Config{Name: "PodCertificateRequests", Store: s.waiting, Log: s.c.Log.With("cluster", s.c.Cluster),
		List: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = ours
			list, err := requests.List(ctx, o)
			if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
				err = fmt.Errorf("%w (is certificates.k8s.io/v1beta1 with PodCertificateRequest switched on, and may the CA list podcertificaterequests?)", err)
			}
			return list, err
		},
		Watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = ours
			return requests.Watch(ctx, o)
		},
	})
	var running sync.WaitGroup
	running.Go(func() { f.Run(ctx) })
	for range workers {
		running.Go(func() {
			for s.next(ctx) {
			}
		})
	}
	<-ctx.Done()
	s.queue.ShutDown()
	running.Wait()
	return nil
}

// next works on one request of the queue, and is false at the end.
func (s *Signer) next(ctx context.Context) bool {
	key, ended := s.queue.Get()
	if ended {
		return false
	}
	defer s.queue.Done(key)
	if ctx.Err() != nil {
		return true
	}
	r := s.waiting.get(key)
	if r == nil { // gone, or done
		s.queue.Forget(key)
		return true
	}
	whose, _ := s.whose(r)
	if wait := s.rates.wait(whose, whose+" "+string(r.Spec.PodUID)); wait > 0 {
		s.queue.AddAfter(key, wait)
		return true
	}
	actx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	switch err := s.answer(actx, r, s.queue.NumRequeues(key)); {
	case err == nil:
		s.queue.Forget(key)
	case errors.Is(err, errLater):
		s.queue.AddRateLimited(key)
	default:
		if ctx.Err() == nil {
			s.c.Log.Warn("a request for a Pod Certificate is not answered yet", "cluster", s.c.Cluster, "request", key.String(), "err", err)
		}
		s.queue.AddRateLimited(key)
	}
	return true
}

// whose says to whom a request counts: to its node, if it is for a pod of its namespace on that node. Otherwise to whoever may make
// requests in the namespace, who must not use up what the node or the pod that he names has. most is how many of them may wait.
func (s *Signer) whose(r *certificatesv1beta1.PodCertificateRequest) (whose string, most int) {
	p := s.c.Pods.Pod(s.c.Cluster, string(r.Spec.PodUID))
	if p != nil && p.Namespace == r.Namespace && p.NodeName == string(r.Spec.NodeName) || p == nil && !s.c.Pods.IsSynced(s.c.Cluster) {
		return "node " + string(r.Spec.NodeName), maxOfNode
	}
	return "namespace " + r.Namespace, maxOfNamespace
}

// full returns what logs, once a minute at most, that somebody has too many requests.
func (s *Signer) full() func(whose string) {
	var at time.Time
	return func(whose string) {
		if now := time.Now(); now.Sub(at) >= time.Minute {
			at = now
			s.c.Log.Warn("there are too many requests for Pod Certificates; those for which there is no room are not answered", "cluster", s.c.Cluster, "of", clip(whose), "most_in_all", maxWaiting)
		}
	}
}

// answered tells whether a request has its final answer.
func answered(r *certificatesv1beta1.PodCertificateRequest) bool {
	for _, c := range r.Status.Conditions {
		switch c.Type {
		case certificatesv1beta1.PodCertificateRequestConditionTypeIssued, certificatesv1beta1.PodCertificateRequestConditionTypeDenied, certificatesv1beta1.PodCertificateRequestConditionTypeFailed:
			return true
		}
	}
	return false
}

// jittered spreads the waits of a rate limiter.
type jittered struct {
	workqueue.TypedRateLimiter[types.NamespacedName]
}

func (j *jittered) When(k types.NamespacedName) time.Duration {
	d := j.TypedRateLimiter.When(k)
	return d/2 + rand.N(d/2+1)
}
