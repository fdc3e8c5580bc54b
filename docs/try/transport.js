// Entropic transport between m pixels and n prompts with uniform marginals, by damped Newton steps on n dual variables.
// The method of nbs/00_newton.ipynb in plain JavaScript; a test compares the plans with those of otseg.ot.sinkhorn.

const MAX_EXPONENT = 40; // largest (C - min C) / eps that is solved directly; beyond it, eps decreases level by level
const EPS_FACTOR = 4; // quotient of eps on two neighbouring levels
const FALLBACK = Math.log(100); // beyond this logarithmic error of a marginal, a step of Sinkhorn replaces Newton's

// Solve H x = r by elimination with pivots. H (n x n) and r are overwritten.
function solve(H, r, n) {
  for (let i = 0; i < n; i++) {
    let pivot = i;
    for (let k = i + 1; k < n; k++) if (Math.abs(H[k * n + i]) > Math.abs(H[pivot * n + i])) pivot = k;
    if (pivot !== i) {
      for (let j = 0; j < n; j++) [H[i * n + j], H[pivot * n + j]] = [H[pivot * n + j], H[i * n + j]];
      [r[i], r[pivot]] = [r[pivot], r[i]];
    }
    for (let k = i + 1; k < n; k++) {
      const factor = H[k * n + i] / H[i * n + i];
      for (let j = i; j < n; j++) H[k * n + j] -= factor * H[i * n + j];
      r[k] -= factor * r[i];
    }
  }
  for (let i = n - 1; i >= 0; i--) {
    for (let j = i + 1; j < n; j++) r[i] -= H[i * n + j] * r[j];
    r[i] /= H[i * n + i];
  }
  return r;
}

// Plan (m x n, row by row) for the cost C (m x n), with marginals 1/m and 1/n.
export function transportPlan(C, m, n, eps, tol = 1e-6, maxIter = 100) {
  const lowest = new Float64Array(m).fill(Infinity);
  let spread = 0;
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) lowest[i] = Math.min(lowest[i], C[i * n + j]);
    for (let j = 0; j < n; j++) spread = Math.max(spread, C[i * n + j] - lowest[i]);
  }
  const levels = spread > MAX_EXPONENT * eps ? Math.ceil(Math.log(spread / (MAX_EXPONENT * eps)) / Math.log(EPS_FACTOR)) : 0;
  const logNu = -Math.log(n), P = new Float64Array(m * n), c = new Float64Array(n), Q = new Float64Array(n * n);
  let a = new Float64Array(n);

  const fillPlan = (levelEps) => { // P: softmax over the prompts of each pixel
    for (let i = 0; i < m; i++) {
      let largest = -Infinity, sum = 0;
      for (let j = 0; j < n; j++) {
        const logit = (lowest[i] - C[i * n + j]) / levelEps + a[j];
        P[i * n + j] = logit;
        largest = Math.max(largest, logit);
      }
      for (let j = 0; j < n; j++) sum += P[i * n + j] = Math.exp(P[i * n + j] - largest);
      for (let j = 0; j < n; j++) P[i * n + j] /= sum;
    }
  };

  for (let level = levels; level >= 0; level--) {
    const levelEps = eps * EPS_FACTOR ** level, levelTol = level ? 1e-2 : tol;
    if (level < levels) a = a.map((x) => EPS_FACTOR * x);
    for (let iteration = 0; iteration < maxIter; iteration++) {
      fillPlan(levelEps);
      c.fill(0);
      Q.fill(0);
      for (let i = 0; i < m; i++) {
        for (let j = 0; j < n; j++) {
          c[j] += P[i * n + j] / m;
          for (let k = 0; k < n; k++) Q[j * n + k] += (P[i * n + j] * P[i * n + k]) / m;
        }
      }
      const error = c.map((x) => logNu - Math.log(Math.max(x, 1e-300)));
      const worst = Math.max(...error.map(Math.abs));
      if (worst <= 0.1 * tol) break;
      let step = error;
      if (worst <= FALLBACK) {
        const H = new Float64Array(n * n); // of the dual; the last term fixes the constant that no plan depends on
        for (let j = 0; j < n; j++) {
          for (let k = 0; k < n; k++) H[j * n + k] = (j === k ? c[j] : 0) - Q[j * n + k] + c[j] * c[k];
        }
        step = solve(H, c.map((x, j) => x * Math.expm1(error[j])), n);
        const length = Math.max(Math.max(...step) - Math.min(...step), 1e-6);
        step = step.map((x) => (x * Math.log1p(length)) / length);
      }
      for (let j = 0; j < n; j++) a[j] += step[j];
      if ((Math.max(...step) - Math.min(...step)) ** 2 < levelTol) {
        fillPlan(levelEps);
        break;
      }
    }
  }
  return P.map((x) => x / m);
}
