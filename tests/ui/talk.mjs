// Talks to a llama-server's web UI as a person would, in a headless Chromium, and prints what it saw as JSON.
//
//     node talk.mjs URL DOCUMENT SCREENSHOTS
//
// The browser comes with an npm package, for x86-64 Linux; FASA_BROWSER names another Chromium.

import { readFile } from 'node:fs/promises';
import chromium from '@sparticuz/chromium';
import playwright from 'playwright-core';

const [url, document, screenshots] = process.argv.slice(2);
const PATIENCE = 600_000; // ms; a prompt is read on a machine that has other things to do

async function launch() {
    const given = process.env.FASA_BROWSER;
    try {
        if (!given && `${process.platform} ${process.arch}` !== 'linux x64') {
            throw new Error(`there is no packaged browser for ${process.platform} ${process.arch}`);
        }
        const executablePath = given ?? (await chromium.executablePath());
        return await playwright.chromium.launch({ executablePath, args: given ? ['--no-sandbox'] : chromium.args });
    } catch (error) {
        console.error(`error: no browser starts: ${error.message}\n  remedy: set FASA_BROWSER to the path of a Chromium`);
        process.exit(1);
    }
}

const browser = await launch();
const context = await browser.newContext({
    viewport: { width: 1100, height: 800 },
    permissions: ['clipboard-read', 'clipboard-write'],
});
const page = await context.newPage();
page.setDefaultTimeout(PATIENCE);

const seen = { errors: [], requests: [], answers: [] };
page.on('pageerror', (error) => seen.errors.push(String(error)));
page.on('request', (request) => {
    if (request.url().endsWith('/chat/completions')) {
        const { fasa_enabled = null, messages } = request.postDataJSON();
        seen.requests.push({ fasa_enabled, text: JSON.stringify(messages) });
    }
});

const picture = (name) => page.screenshot({ path: `${screenshots}/${name}.png` });
const input = page.locator('form [role=textbox], form textarea').first();
const answers = page.getByRole('group', { name: 'Assistant message with actions' });
const toggle = page.getByRole('switch', { name: 'FASA' });

// Asks, and watches the answer grow until the strip below it says that it is complete.
async function ask(question, name) {
    const n_before = await answers.count();
    await input.click();
    await page.keyboard.insertText(question);
    await page.keyboard.press('Enter');
    const answer = answers.nth(n_before);
    await answer.waitFor();

    const strip = answer.getByTestId('fasa-strip');
    const lengths = new Set();
    const end = Date.now() + PATIENCE;
    while (!(await strip.count())) {
        if (Date.now() > end) {
            await picture(`${name}-late`);
            throw new Error(`no answer to '${question}' after ${PATIENCE / 1000} s`);
        }
        lengths.add((await answer.innerText()).length);
        if (lengths.size === 4) await picture(`${name}-streaming`);
        await page.waitForTimeout(50);
    }
    await strip.scrollIntoViewIfNeeded();
    await picture(`${name}-answered`);
    seen.answers.push({
        n_states: lengths.size,
        text: await answer.innerText(),
        strip: await strip.locator('span').allInnerTexts(),
    });
}

await page.goto(url);
await toggle.waitFor();
await picture('1-open');

await page.evaluate((text) => navigator.clipboard.writeText(text), await readFile(document, 'utf8'));
await input.click();
await page.keyboard.press('Control+V');
await page.waitForTimeout(500);
await picture('2-pasted');

seen.switch = [await toggle.isChecked()];
await ask('What is this text about?', '3-fasa');
await toggle.click();
seen.switch.push(await toggle.isChecked());
await ask('And who wrote it?', '4-dense');

// What the server says of an answer's budget is believed.
await page.route('**/chat/completions', async (route) => {
    const response = await route.fetch({ timeout: PATIENCE });
    const body = (await response.text()).replaceAll(/"fasa_budget":\d+/g, '"fasa_budget":123');
    await route.fulfill({ response, body });
});
await toggle.click();
seen.switch.push(await toggle.isChecked());
await ask('Why?', '5-told');

await browser.close();
console.log(JSON.stringify(seen));
